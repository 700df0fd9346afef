"""Fast diffusion transformers by computing only the attention that matters."""

from .attention import sparse_attention
from .layout import TokenLayout
from .version import VERSION

__all__ = ["TokenLayout", "sparse_attention"]
__version__ = VERSION
