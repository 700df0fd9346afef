import pytest

from sparse_dit.backends.cpu import library


@pytest.fixture(params=["library", "torch"])
def way(request, monkeypatch):
    """With the kernel's library, and as if it weren't there."""
    if request.param == "torch":
        monkeypatch.setattr(library, "LIBRARY", None)
    elif library.LIBRARY is None:
        pytest.skip(str(library.PROBLEM))
