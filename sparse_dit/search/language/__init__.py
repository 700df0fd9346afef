"""The search of plans for the prefill of causal language models."""

from .engine import search_language_model

__all__ = ["search_language_model"]
