"""The offline stage: profile, score, cost, solve, verify.

The package is what `sparse_dit.search` names, and it can be called: `sparse_dit.search(pipe, prompts)` is
`sparse_dit.search.search(pipe, prompts)`, or for a model of transformers
`sparse_dit.search.language.search_language_model(model, texts)`.
"""

from __future__ import annotations

import inspect
import sys
import types
from typing import Any

from ..integrations import library_of
from .engine import Searched, plan_of, search, search_plan
from .objective import Objective

__all__ = ["Objective", "Searched", "plan_of", "search", "search_plan"]
__signature__ = inspect.signature(search)  # what `inspect.signature` shows of the package


class _Search(types.ModuleType):
    def __call__(self, model: Any, *args: Any, **options: Any) -> Any:
        if library_of(model) != "transformers":
            return search(model, *args, **options)
        from .language import search_language_model

        return search_language_model(model, *args, **options)


sys.modules[__name__].__class__ = _Search
