"""What stencils see at distances that the calibrated video doesn't have, and the run that looks at them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from sparse_dit.generation import Case, GenerationSettings
from sparse_dit.integrations import workload
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Pattern, Stencil
from sparse_dit.plan import PlanError
from sparse_dit.search import recorder
from sparse_dit.search.cells import cell_table
from sparse_dit.search.profile_file import read_profile, write_profile
from sparse_dit.search.profiling import profile_pipeline
from sparse_dit.search.ranking import MOST_RUNS, nested_stencil, ranks, runs_each, whole_beyond
from sparse_dit.search.seen import density, seen_tiles
from sparse_dit.search.statistics import COUNT, empty_statistics, of_head

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = GenerationSettings(64, 64, 15, steps=4, guidance=3.0, max_sequence_length=32)
CASES = [Case("a red circle moves left", 0), Case("a yellow triangle moves down", 1)]
SMALL, LARGE = TokenLayout.video(2, 8, 8), TokenLayout.video(2, 8, 16)
WIDE = TokenLayout.video(2, 16, 16)  # of the larger video
TILE = (None, 8, 1)
REACH = torch.tensor([0, 0, 7])
KEYS = ("offset_far", "offset_drop", "offset_count")


def _line(size, values):
    """Statistics of a head that looks along a row: what offsets of these distances save; others 1e-9."""
    layout = TokenLayout.video(2, 8, size)
    statistics = of_head(empty_statistics(layout, [TILE], 1)[TILE], 0)
    statistics["offset_count"] += 1
    for key in KEYS[:2]:
        statistics[key] += 1e-9
        for distance, value in values.items():
            statistics[key][0, 0, distance + size - 1] = value
    return statistics


def _with_beyond(near, wide):
    names = ("beyond_far", "beyond_drop", "beyond_count")
    return near | {name: wide[key] for name, key in zip(names, KEYS, strict=True)}


def _stencils(place, counts, near, most_runs=MOST_RUNS):
    """By their counts."""
    return {
        count: nested_stencil(place, counts, number, near, most_runs)
        for number, count in enumerate(counts)
    }


def _order(statistics):
    """Distances along the row by what they save, the own tile first."""
    value = statistics["offset_far"][0, 0].clone()
    value[len(value) // 2] = torch.inf
    column = value.argsort(descending=True, stable=True) - len(value) // 2
    return torch.stack([column * 0, column * 0, column], 1)


def _seen(stencil, counts):
    """Distances along the row that the first and the last of so many tiles see."""
    mask = seen_tiles(Pattern(stencil, TILE), TokenLayout.video(2, 8, counts))
    first, last = mask[0].nonzero()[:, 0], mask[-1].nonzero()[:, 0] - counts + 1
    return set(first.tolist()) | set(last.tolist())


def test_without_the_run_the_border_stands_for_all_beyond():
    near = _line(8, {0: 1.0, 1: 0.5, -7: 0.25, 2: 0.1})
    ranked = _order(near)
    made = _stencils(ranks(near, "offset_far", ranked), [1, 3, 4], REACH)
    assert made == {n: Stencil.from_offsets(ranked[:n], (0, 0, 7)) for n in (1, 3, 4)}
    assert _seen(made[3], 16) == {0, 1, *range(-15, -6)}


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_far_offset_comes_with_the_one_that_saves_no_more(scale):
    near = _line(8, {0: 1.0, 1: 0.5, -1: 0.25, 2: 0.1})
    far = {0: 1.0, 1: 0.5, -1: 0.25, 2: 0.1, 12: 0.3, -13: 0.05}
    wide = _line(16, {distance: scale * value for distance, value in far.items()})
    for key in KEYS[:2]:
        wide[key][wide[key] == 1e-9] *= scale
    both = _with_beyond(near, wide)
    made = _stencils(ranks(both, "offset_far", _order(near)), [1, 2, 3, 4], REACH)
    assert _seen(made[2], 16) == {0, 1}
    assert _seen(made[3], 16) == {0, 1, -1, 12}
    assert _seen(made[4], 16) == {0, 1, -1, 2, 12}
    for count, stencil in made.items():
        assert stencil.reach == (0, 0, 15)
        plain = Stencil.from_offsets(_order(near)[:count], (0, 0, 7))
        assert _seen(stencil, 8) == _seen(plain, 8)


def test_the_own_tile_of_a_head_that_looks_elsewhere_does_not_matter():
    near = _line(8, {0: 1e-12, 3: 0.5, -3: 0.2})
    wide = _line(16, {0: 1e-12, 3: 0.5, -3: 0.2, 11: 0.3})
    made = _stencils(ranks(_with_beyond(near, wide), "offset_drop", _order(near)), [2, 3], REACH)
    assert _seen(made[2], 16) == {0, 3}
    assert _seen(made[3], 16) == {0, 3, -3, 11}


def test_a_plan_grows_by_so_many_runs_at_most():
    near = _line(8, {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.1})
    wide = _line(16, {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.1, 9: 0.3, -9: 0.2, 11: 0.2})
    place = ranks(_with_beyond(near, wide), "offset_far", _order(near))
    made = _stencils(place, [2, 3, 4], REACH, 2)
    assert [_seen(made[n], 16) for n in (2, 3, 4)] == [{0, 1}, {0, 1, 2, 9}, {0, 1, 2, 3, 9}]
    assert runs_each(48) == MOST_RUNS  # a plan of few heads
    assert runs_each(40 * 40 * 5) * 40 * 40 * 5 * 14 < 8 << 20  # bytes: of a large one


def test_what_was_not_sampled_is_like_the_border():
    near = _line(8, {0: 1.0, 7: 0.5})
    wide = _line(16, {0: 1.0, 7: 0.5, 8: 0.5})
    wide["offset_count"][0, 0, 15 + 9] = 0
    made = _stencils(ranks(_with_beyond(near, wide), "offset_far", _order(near)), [2], REACH)
    assert _seen(made[2], 16) == {0, 7, 8, 9}


@pytest.fixture(scope="module")
def looked(short_pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("looked") / "profile.safetensors"
    profile_pipeline(short_pipe, CASES, SETTINGS, rows=8, path=path)
    return path


def test_the_run_has_as_many_tokens_and_twice_the_reach(short_pipe, looked):
    assert workload(short_pipe, SETTINGS).larger().settings == replace(
        SETTINGS, height=128, width=128, num_frames=3, guidance=1.0, steps=2
    )
    part = read_profile(looked).components["transformer"]
    assert part.known_layout.grid == (8, 8, 8)
    head = part.statistics(0, part.layers[0], 0)
    assert head[4, 4, 4]["beyond_count"].shape == (1, 7, 7)
    assert head[None, 8, 1]["beyond_far"].shape == (1, 3, 31)
    assert list(part.beyond) == part.layers, "looked at once, for all noise levels"
    for orders in part.beyond.values():
        for tile, statistics in orders.items():
            assert statistics[COUNT].sum() == 8 * len(cell_table(WIDE, tile).tokens)
    lines = [p.shape for p in part.candidates(0, part.layers[0])[0] if p.tile == (None, 8, 1)]
    assert {shape.reach for shape in lines if isinstance(shape, Stencil)} == {(0, 1, 15)}


def test_nothing_changes_at_the_calibrated_size(short_pipe, looked):
    one = read_profile(looked).components["transformer"]
    other = profile_pipeline(short_pipe, CASES, SETTINGS, rows=8, beyond=False).components[
        "transformer"
    ]
    for key, scores in one.scores.items():
        torch.testing.assert_close(scores["error"], other.scores[key]["error"])
        for mine, theirs in zip(one.candidates(*key), other.candidates(*key), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert density(a, one.known_layout) == density(b, one.known_layout)


def test_the_run_ends_after_its_first_step(short_pipe, monkeypatch):
    made = profile_pipeline(short_pipe, CASES, SETTINGS, rows=8, beyond=False)
    forwards, decoded = [], []
    monkeypatch.setattr(short_pipe.vae, "decode", lambda *_, **__: decoded.append(1))
    hook = short_pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    recorder.profile_larger(short_pipe, made, CASES[0])
    hook.remove()
    assert len(forwards) == 1 and not decoded
    part = made.components["transformer"]
    assert list(part.beyond) == part.layers


def test_a_pipeline_that_refuses_the_size_says_so(short_pipe, monkeypatch):
    def refuse(*_):
        raise ValueError("no such size")

    said = []
    refused = SimpleNamespace(larger=lambda: SimpleNamespace(run=refuse))
    monkeypatch.setattr(recorder, "workload", lambda *_: refused)
    made = profile_pipeline(
        short_pipe, CASES, SETTINGS, rows=8, report=lambda *text: said.append(text[2])
    )
    assert "greater distances can't be looked at: no such size" in said and len(made.done) == 3
    assert not made.components["transformer"].beyond


def test_a_pipeline_that_breaks_at_the_size_says_so(short_pipe, monkeypatch):
    made, said = profile_pipeline(short_pipe, CASES, SETTINGS, rows=8, beyond=False), []
    values = short_pipe.transformer.blocks[0].attn1.to_v
    nan = torch.nn.Parameter(torch.full_like(values.weight, torch.nan))
    monkeypatch.setattr(values, "weight", nan)
    recorder.profile_larger(short_pipe, made, CASES[0], said.append)
    (text,) = said
    assert "greater distances can't be looked at: blocks.0.attn1 head" in text and "NaN" in text
    assert not made.components["transformer"].beyond


def test_an_image_has_no_frames_to_give(short_pipe):
    image = workload(short_pipe, replace(SETTINGS, num_frames=1))
    assert not image.has_larger and image.larger() is None


def test_what_heads_and_levels_share_is_kept_once(tmp_path):
    path, golden = tmp_path / "new.safetensors", GOLDEN / "profile.safetensors"  # of an older form
    old = read_profile(golden)
    write_profile(old, path)
    with safe_open(path, "pt") as file, safe_open(golden, "pt") as before:
        assert file.metadata()["format"] != before.metadata()["format"]
        place = "transformer|0|blocks.0.attn1|4x4x4"
        counts = before.get_tensor(f"found|{place}|{COUNT}")
        assert counts.equal(file.get_tensor(f"found|{place}|{COUNT}").expand_as(counts))
        ends = ("transformer|blocks.0.attn1|4x4x4|offset_far", f"{place}|beyond_far")
        assert file.get_tensor(f"beyond|{ends[0]}").equal(before.get_tensor(f"found|{ends[1]}"))
    assert path.stat().st_size < golden.stat().st_size
    one, other = old.components["transformer"], read_profile(path).components["transformer"]
    for key, scores in one.scores.items():
        assert [*map(list, one.candidates(*key))] == [*map(list, other.candidates(*key))]
        torch.testing.assert_close(scores, other.scores[key], rtol=0, atol=0)


def test_a_file_that_lacks_some_of_it_is_damaged(looked, tmp_path):
    path = tmp_path / "profile.safetensors"
    data = looked.read_bytes()
    name = b"beyond|transformer|blocks.0.attn1|4x4x4|offset_drop"
    assert name in data
    path.write_bytes(data.replace(name, name.replace(b"drop", b"dorp")))
    with pytest.raises(PlanError, match="damaged"):
        read_profile(path)
    names, each = ("offset_far", "offset_drop"), torch.zeros(2, 1, 3, 3)
    assert whole_beyond({**dict.fromkeys(names, each), COUNT: each[0]}, heads=2)
    assert not whole_beyond({**dict.fromkeys(names, each), COUNT: each[0]}, heads=3)
    assert not whole_beyond(dict.fromkeys(names, each), heads=2)
    assert not whole_beyond({**dict.fromkeys(names, each[..., :2]), COUNT: each[0, ..., :2]}, 2)
