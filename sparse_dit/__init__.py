"""Fast diffusion transformers by computing only the attention that matters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .attention import sparse_attention
from .layout import TokenLayout
from .models import add_model, supported_models
from .patch import patch, unpatch
from .plan import Plan
from .version import VERSION

if TYPE_CHECKING:
    from .search.engine import search
    from .search.starting import geometric_plan

__all__ = [
    "Plan",
    "TokenLayout",
    "add_model",
    "geometric_plan",
    "patch",
    "search",
    "sparse_attention",
    "supported_models",
    "unpatch",
]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """What needs the search's libraries is imported when it is first asked for."""
    if name == "search":  # a package that can be called
        return importlib.import_module(".search", __name__)
    if name == "geometric_plan":
        return importlib.import_module(".search.starting", __name__).geometric_plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
