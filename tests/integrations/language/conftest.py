import pytest

from sparse_dit import exact


@pytest.fixture(autouse=True)
def short_calls_are_computed(monkeypatch):
    """The models of these tests are tiny, and so are their prompts; exact mode leaves such calls to stock."""
    monkeypatch.setattr(exact, "LEAST_QUERIES", 2)
    monkeypatch.setattr(exact, "LEAST_PAIRS", 0)
