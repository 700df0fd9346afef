"""What tests of several files ask for by name."""

import pytest

from sparse_dit.backends.cpu import library


@pytest.fixture(params=library.LIBRARY.runnable if library.LIBRARY else [None])
def variant(request):
    """Each variant of the CPU kernel that this machine runs, forced while the test runs."""
    if library.LIBRARY is None:
        pytest.skip(library.PROBLEM)
    before = library.LIBRARY.variant
    library.LIBRARY.use_variant(request.param)
    yield request.param
    library.LIBRARY.variant = before
