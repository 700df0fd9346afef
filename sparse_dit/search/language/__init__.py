"""The search of plans for the prefill of causal language models."""

from .engine import SearchedLanguage, search_language_model, search_language_plan

__all__ = ["SearchedLanguage", "search_language_model", "search_language_plan"]
