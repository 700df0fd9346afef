"""Adapters to the libraries whose models are patched; the only modules that know them."""
