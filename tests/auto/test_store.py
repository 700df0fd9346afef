"""The store of learned plans, and the command that lists, shows and deletes them."""

import pytest

from sparse_dit import cli
from sparse_dit.auto.store import PlanStore, fingerprint, size_class, tokens_of
from sparse_dit.plan import Plan
from tests.helpers.tiny_pipelines import wan


@pytest.fixture
def store(tmp_path):
    store = PlanStore(tmp_path / "plans")
    store.keep("one", Plan.from_pretrained("tiny-wan"))
    return store


def test_the_variable_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_DIT_CACHE", str(tmp_path))
    assert PlanStore().folder == tmp_path
    assert PlanStore(tmp_path / "other").folder == tmp_path / "other"
    monkeypatch.delenv("SPARSE_DIT_CACHE")
    assert PlanStore().folder.name == "plans"


def test_lengths_share_a_class_with_their_neighbours():
    assert size_class(4608) == size_class(4700) == size_class(tokens_of(size_class(4608)))
    assert size_class(4608) < size_class(9216) == size_class(4608) + 2


def test_a_fingerprint_tells_weights_and_adapters_apart():
    pipe, _ = wan()
    first = fingerprint({"transformer": pipe.transformer})
    assert fingerprint({"transformer": pipe.transformer}) == first
    pipe.transformer.blocks[0].attn1.scaling = {"default": 0.5}
    assert fingerprint({"transformer": pipe.transformer}) != first
    other, _ = wan(seed=1)
    assert fingerprint({"transformer": other.transformer}) != first


def test_the_commands(store, capsys):
    folder = ["--cache", str(store.folder)]
    assert cli.run(["plans", *folder]) == 0
    said = capsys.readouterr().out
    assert "one" in said and "WanPipeline" in said and "1 plans in" in said
    assert cli.run(["plans", "--show", "one", *folder]) == 0
    assert "density" in capsys.readouterr().out
    assert cli.run(["plans", "--show", "two", *folder]) == 2
    assert "has no plan 'two'" in capsys.readouterr().err
    assert cli.run(["plans", "--remove", "../one", *folder]) == 2
    assert cli.run(["plans", "--remove", "one", *folder]) == 0
    assert store.names() == []
    store.keep("two", Plan.from_pretrained("tiny-wan"))
    store.file("three").write_text("{")
    assert cli.run(["plans", "--remove-all", *folder]) == 0
    assert list(store.folder.iterdir()) == []
    assert cli.run(["plans", *folder]) == 0
    assert "0 plans in" in capsys.readouterr().out
