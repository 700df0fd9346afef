"""Fast diffusion transformers by computing only the attention that matters."""

from .attention import sparse_attention
from .layout import TokenLayout
from .models import add_model, supported_models
from .patch import patch, unpatch
from .plan import Plan
from .version import VERSION

__all__ = [
    "Plan",
    "TokenLayout",
    "add_model",
    "patch",
    "sparse_attention",
    "supported_models",
    "unpatch",
]
__version__ = VERSION
