"""The search of plans for the prefill of causal language models."""
