"""Fast diffusion transformers by computing only the attention that matters."""

from .attention import sparse_attention
from .layout import TokenLayout
from .patch import patch, unpatch
from .plan import Plan
from .version import VERSION

__all__ = ["Plan", "TokenLayout", "patch", "sparse_attention", "unpatch"]
__version__ = VERSION
