"""Plans: saving, and what survives it."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest
import torch

from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import (
    Blocks,
    Dense,
    Pattern,
    Skip,
    SlidingTile,
    Stencil,
    Stripe,
    Union,
    Vertical,
    Window,
)
from sparse_dit.plan import HeadChoice, Plan, PlanError, Stage, diff
from sparse_dit.plan.document import parse, render
from tests.helpers.plan_cases import GOLDEN, component, small


def test_save_makes_folders_and_refuses_to_overwrite(tmp_path):
    file = tmp_path / "a" / "b" / "plan.json"
    small().save(file)
    with pytest.raises(PlanError, match="exists already; pass overwrite=True"):
        small(density=0.25).save(file)
    assert Plan.load(file).density == 0.5
    small(density=0.25).save(file, overwrite=True)
    assert Plan.load(file).density == 0.25


def test_save_refuses_to_overwrite_a_tensor_file_that_lies_there(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(PlanError, match=r"model\.safetensors: exists already"):
        Plan.load(GOLDEN).save(tmp_path / "model.json")
    small().save(tmp_path / "model.json", overwrite=True)  # it has no tensors
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("name", "words"),
    [("plan.txt", "must end in .json"), ("plan", "must end in .json"), ("d.json", "is a folder")],
)
def test_save_refuses_a_name_that_is_no_plan(name, words, tmp_path):
    (tmp_path / "d.json").mkdir()
    with pytest.raises(PlanError, match=words):
        small().save(tmp_path / name)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_midway_leaves_the_old_file(call, tmp_path, monkeypatch):
    small().save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    for plan in (small(density=0.25), Plan.load(GOLDEN)):
        with pytest.raises(PlanError, match="can't be written: No space left on device"):
            plan.save(tmp_path / "plan.json", overwrite=True)
    assert (tmp_path / "plan.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_save_that_is_interrupted_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        small().save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


# --- round trips


def random_shape(rng: random.Random) -> Any:
    def axes(low: int, high: int) -> list[Any]:
        return [rng.choice([None, rng.randint(low, high)]) for _ in range(3)]

    def offset() -> tuple[int, int]:
        return (rng.randint(-9, 9), rng.randint(-9, 9))

    return rng.choice(
        [
            lambda: Dense(),
            lambda: Skip(),
            lambda: Window(*axes(0, 9)),
            lambda: Window(frames=(rng.uniform(-4, 4), rng.random())),
            lambda: SlidingTile(*axes(1, 9)),
            lambda: Stripe(time_width=rng.randint(1, 4), space_width=(0, 1), space_offset=offset()),
            lambda: Stencil.from_offsets(torch.randint(-3, 4, (rng.randint(1, 20), 3))),
            lambda: Vertical((2, 3, 4), tuple(sorted(rng.sample(range(24), 5)))),
            lambda: Blocks.from_mask(torch.rand(6, 6) > 0.5, (1, 2, 3)),
        ]
    )()


def random_pattern(rng: random.Random) -> Pattern:
    parts = tuple(random_shape(rng) for _ in range(rng.randint(2, 4)))
    shape = Union(parts) if rng.random() < 0.2 else parts[0]
    tile = tuple(rng.choice([None, 1, 4, 8]) for _ in range(3))
    cell = rng.choice([None, 1, 16])
    return Pattern(shape, tile, cell, rng.random() < 0.5, rng.choice([0, 1]))


def random_plan(seed: int) -> Plan:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pool = [random_pattern(rng) for _ in range(rng.randint(1, 12))]
    cuts = sorted({1.0, 0.0, *(rng.random() for _ in range(rng.randint(0, 4)))}, reverse=True)
    stages = []
    for high, low in itertools.pairwise(cuts):
        branches = rng.choice([["any"], ["cond", "uncond"], ["uncond"]])
        stages += [Stage(high, low, branch) for branch in branches]

    def head() -> HeadChoice:
        spare = rng.choice([None, rng.choice(pool)])
        spare_error = None if spare is None else rng.choice([None, rng.random()])
        return HeadChoice(rng.choice(pool), rng.choice([None, rng.random()]), spare, spare_error)

    def layers() -> dict[str, Any]:
        sizes = [rng.randint(1, 6) for _ in range(rng.randint(0, 4))]
        return {
            f"blocks.{i}.attn1": tuple(tuple(head() for _ in range(size)) for _ in stages)
            for i, size in enumerate(sizes)
        }

    components = {
        name: component(
            stages=tuple(stages),
            layers=(rows := layers()),
            heads={layer: (len(said[0]), rng.randint(1, 99)) for layer, said in rows.items()},
            valid_tokens=(rng.randint(0, 99), rng.choice([None, 4096])),
            layout=TokenLayout.video(3, 5, 7, text_after=rng.randint(0, 3)),
        )
        for name in ["transformer", "transformer_2"][: rng.randint(1, 2)]
    }
    notes = {"seeds": [rng.getrandbits(64)], "text": "ein\tüber 猫\n", "x": rng.random(), "n": None}
    return Plan("", components, rng.random(), provenance=notes, cost={"a": [{"b": [1, 2.5e-7]}]})


@pytest.mark.parametrize("seed", range(40))
def test_random_plan_survives_the_round_trip(seed, tmp_path):
    plan = random_plan(seed)
    plan.save(tmp_path / "a.json")
    again = Plan.load(tmp_path / "a.json")
    assert again == plan and diff(plan, again) == []
    assert again.fingerprint() == plan.fingerprint()
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    for x, y in zip(plan.components.values(), again.components.values(), strict=True):
        for layer in x.layers:
            for sigma in (0.0, 0.3, 1.0):
                assert x.patterns(layer, sigma, "uncond") == y.patterns(layer, sigma, "uncond")


def test_notes_are_copied_and_take_only_what_json_has():
    seeds = (1, 2)
    plan = small(provenance={"seeds": seeds})
    assert plan.provenance == {"seeds": [1, 2]}
    with pytest.raises(PlanError, match=r"cost\.x: must be plain numbers or text, got Tensor"):
        small(cost={"x": torch.zeros(1)})
    with pytest.raises(PlanError, match=r"measured\.psnr: a number must be finite, got inf"):
        small(measured={"psnr": float("inf")})
    with pytest.raises(PlanError, match="forecast: a key must be text, got 1"):
        small(forecast={1: 2})


def test_a_document_is_parsed_as_it_was_rendered():
    text = {"version": 1, "prompts": ["a" * 60, "b" * 60], "deep": {"x": {"y": [{}, [], 1.0]}}}
    assert parse(render(text)) == text
    assert render(parse(render(text))) == render(text)
