"""Where PyTorch's compiler works on this processor, or on what it was told to pretend to be."""

import pytest
from torch.backends.cpu import get_cpu_capability

from sparse_dit.backends.flex import X86

needs_inductor = pytest.mark.skipif(
    X86 and get_cpu_capability() == "DEFAULT",
    reason="inductor writes vectors that PyTorch has for AVX2 and AVX-512 alone",
)
