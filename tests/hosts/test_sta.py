"""STA strategy files: windows of plans and back, and the rule of the kernels that read them."""

import json
from importlib.util import find_spec

import pytest
import torch

from sparse_dit import cli
from sparse_dit.hosts.sta import Strategy, export_sta, flow_sigmas, import_sta, sigmas_of
from sparse_dit.hosts.sta.windows import TILE, density, fitted, pattern_of, tiles_of
from sparse_dit.index import pattern_index
from sparse_dit.integrations import self_attention_layers
from sparse_dit.layout import Boxes, TokenLayout, tile_order
from sparse_dit.patterns import Dense, Pattern, SlidingTile, Stencil, Window
from sparse_dit.plan import HeadChoice, Plan, PlanError, Stage
from sparse_dit.resources import shipped
from tests.helpers.plan_cases import assert_refused, component, small
from tests.helpers.tiny_video_models import BUILDERS

GRID = (18, 16, 24)  # 3 x 2 x 3 tiles
CASES = [(1, 1, 1), (3, 1, 1), (2, 2, 3), (1, 2, 1), (3, 2, 1), (5, 5, 5)]
LAYERS, HEADS = 6, 3  # of the embedded model
DENSE = HeadChoice(Pattern(Dense()))


def by_the_kernel(window, tiles):
    """The centre clamped, and as far on either side: as sparsevideo 0.1.0 fills its block mask."""
    axes = []
    for k, n in zip(window, tiles, strict=True):
        seen = torch.zeros(n, n, dtype=torch.bool)
        for x in range(n):
            centre = max(k // 2, min(x, n - 1 - k // 2))
            seen[x, max(0, centre - k // 2) : min(n, centre + k // 2 + 1)] = True
        axes.append(seen)
    t, h, w = axes
    whole = t[:, None, None, :, None, None] & h[None, :, None, None, :, None]
    whole = whole & w[None, None, :, None, None, :]
    n = whole.shape[0] * whole.shape[1] * whole.shape[2]
    return whole.reshape(n, n)


def seen_along(pattern, grid, axis):
    """Which tokens of a line along an axis see which, by the pattern, in whole tiles of its own."""
    order = tile_order(TokenLayout.video(*grid), pattern.tile)
    place = torch.zeros(grid[axis], 3, dtype=torch.int64)
    place[:, axis] = torch.arange(grid[axis])
    low = place // torch.tensor(order.tile) * torch.tensor(order.tile)
    high = torch.minimum(low + torch.tensor(order.tile), torch.tensor(grid)) - 1
    return pattern.shape.covers(Boxes(low, high), Boxes(low, high), order)


@pytest.mark.parametrize("window", CASES)
@pytest.mark.parametrize("tiles", [(3, 2, 3), (5, 6, 10), (1, 4, 2)])
def test_a_window_sees_what_the_kernels_let_it_see(window, tiles):
    grid = tuple(n * size for n, size in zip(tiles, TILE, strict=True))
    wanted = by_the_kernel(window, tiles)
    index = pattern_index(pattern_of(window, grid), TokenLayout.video(*grid))
    assert index.density == pytest.approx(wanted.double().mean().item(), abs=1e-9)
    assert density(window, grid) == pytest.approx(index.density, abs=1e-9)
    pattern = pattern_of(window, grid)
    if not pattern.is_dense:
        order = tile_order(TokenLayout.video(*grid), TILE)
        boxes = order.boxes()
        assert torch.equal(pattern.shape.covers(boxes, boxes, order), wanted)
    again = fitted(pattern, grid)
    assert again.exact
    assert pattern_of(again.window, grid) == pattern


@pytest.mark.skipif(find_spec("sparsevideo") is None, reason="sparsevideo isn't installed")
def test_the_rule_is_sparsevideos_own():
    from sparsevideo.methods.sta.ops import _sta_a100_block_mask_cpu  # pyright: ignore

    for window in CASES:
        theirs = _sta_a100_block_mask_cpu(1, 18 * 48 * 80, 18 * 48 * 80, "18x48x80", (window,))
        assert torch.equal(theirs[0, 0, ::3, ::3], by_the_kernel(window, (3, 6, 10)))


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(SlidingTile(3, 3, None), tile=(4, 4, 4)),
        Pattern(SlidingTile(2, 1, 1), tile=(3, 8, 8)),
        Pattern(Window(frames=2, rows=3), tile=(4, 4, 4)),
        Pattern(Window(frames=0, columns=(0.0, 0.25)), tile=(1, 8, 8)),
        Pattern(Window(rows=1), tile=(1, 4, 4), cell=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [GRID, (13, 30, 52)])
def test_another_window_becomes_the_smallest_that_holds_it(pattern, grid):
    found = fitted(pattern, grid)
    tiles = tiles_of(grid)
    assert found.exact or found.window != tiles or found.dense_because is not None
    for axis, count in enumerate(found.window):
        needed = seen_along(pattern, grid, axis)

        def holds(count, axis=axis, needed=needed):
            window = [1, 1, 1]
            window[axis] = count
            if count == tiles[axis]:
                return True
            return not (needed & ~seen_along(pattern_of(tuple(window), grid), grid, axis)).any()

        assert holds(count)
        smaller = range(1, count, 2)
        assert not any(holds(k) for k in smaller)


def windows_plan():
    near, wide = Pattern(SlidingTile(1, 1, 3), tile=TILE), Pattern(Window(frames=2), tile=TILE)
    far = Pattern(SlidingTile(1, 1, 1), tile=TILE, far=True)
    layers = {
        "blocks.0.attn1": ((DENSE, DENSE), (HeadChoice(near), HeadChoice(wide))),
        "blocks.2.attn1": ((DENSE, DENSE), (HeadChoice(far), HeadChoice(near))),
    }
    part = component(layers=layers, layout=TokenLayout.video(*GRID, text_after=5))
    return small(components={"transformer": part})


def test_an_export_says_what_became_of_every_head(tmp_path):
    made = export_sta(windows_plan(), [1.0, 0.7, 0.4, 0.1])
    assert made.strategy.shape == (4, 3, 2)
    first, _, third, last = made.strategy.windows
    whole = (3, 2, 3)
    assert first == ((whole, whole),) * 3
    assert third == last == (((1, 1, 3), (3, 2, 3)), (whole, whole), (whole, (1, 1, 3)))
    assert (made.exact, made.widened, made.planned_dense) == (4, 0, 16)
    assert made.lost == {"far field": 2, "window so wide that tiles of 6x8x8 fill the grid": 2}
    assert any("18x48x80" in line for line in made.lines)
    made.strategy.save(tmp_path / "s.json")
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["2_0_0"] == [1, 1, 3]
    assert Strategy.load(tmp_path / "s.json") == made.strategy
    with pytest.raises(PlanError, match="exists already"):
        made.strategy.save(tmp_path / "s.json")


def test_guidance_branches_share_the_wider_window():
    a, b = (HeadChoice(Pattern(SlidingTile(*n), tile=TILE)) for n in ((1, 1, 3), (3, 1, 1)))
    stages = (Stage(1.0, 0.0, "cond"), Stage(1.0, 0.0, "uncond"))
    layers = {"blocks.0.attn1": ((a, a), (b, DENSE))}
    part = component(layers=layers, stages=stages, layout=TokenLayout.video(30, 48, 80))
    made = export_sta(small(components={"transformer": part}), [0.5])
    assert made.strategy.windows == ((((3, 1, 3), (5, 6, 10)),),)
    assert made.lost == {"dense in one branch of guidance": 1}


def _windows(layer):
    head = HeadChoice(pattern_of((1, 1, 1), GRID))
    layers = {layer: ((head, head), (head, head))}
    part = component(layers=layers, layout=TokenLayout.video(*GRID))
    return small(components={"transformer": part})


def test_a_plan_that_would_make_an_endless_strategy_is_refused_at_once():
    with pytest.raises(PlanError, match="at most 1048576 windows, got 2 steps of 1000000 layers"):
        export_sta(_windows("blocks.999999.attn1"), [0.9, 0.1])
    with pytest.raises(PlanError, match="block's number, of at most six digits"):
        export_sta(_windows("blocks.1000000.attn1"), [0.9, 0.1])
    with pytest.raises(PlanError, match="at most 1048576 windows, got 524289 steps of 1"):
        export_sta(_windows("blocks.0.attn1"), [0.5] * (2**19 + 1))
    assert export_sta(_windows("blocks.0.attn1"), [0.9, 0.1]).exact == 4


def test_noise_levels_that_are_none_are_refused():
    for steps, shift in ((0, 5.0), (10**9, 5.0), (3, 0.0), (3, float("inf")), (3, float("nan"))):
        with pytest.raises(ValueError, match="steps must be from 1 to 1000000 and the shift > 0"):
            flow_sigmas(steps, shift)
    for level in (None, "a", True, -0.1, 1.5, [0.5]):
        plan = small(provenance={"schedule": {"sigmas": [level, 0.1]}})
        with pytest.raises(ValueError, match="sigmas must be noise levels from 0 to 1, got"):
            sigmas_of(plan, 2, None)


def test_what_no_strategy_can_say_is_refused():
    far = HeadChoice(Pattern(Stencil(((0, 0, 0, 1),)), tile=TILE))
    part = component(layers={"blocks.0.attn1": ((far, far),) * 2})
    with pytest.raises(PlanError, match="4 heads: shape 'stencil'"):
        export_sta(small(components={"transformer": part}), [0.9, 0.4])
    two = small(components={"transformer": part, "transformer_2": part})
    with pytest.raises(PlanError, match="is for one transformer"):
        export_sta(two, [0.5])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "JSON object"),
        ({}, "JSON object"),
        ({"0_0": [1, 1, 1]}, "STEP_LAYER_HEAD"),
        ({"0_0_-1": [1, 1, 1]}, "STEP_LAYER_HEAD"),
        ({"0_0_0": [1, 1]}, "three whole numbers"),
        ({"0_0_0": [1, 1, 0]}, "three whole numbers"),
        ({"0_0_0": [1, 1, True]}, "three whole numbers"),
        ({"0_0_0": "1,1,1"}, "three whole numbers"),
        ({"0_0_0": [1, 1, 1], "1_0_1": [1, 1, 1]}, "missing is '0_0_1'"),
        ({"0_0_0": [1, 1, 1], "999999_999999_999999": [1, 1, 1]}, "missing"),
    ],
)
def test_a_file_that_is_no_strategy_is_refused(data, words, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(data))
    with pytest.raises(PlanError) as error:
        Strategy.load(tmp_path / "s.json")
    assert_refused(str(error.value), words)


@pytest.mark.parametrize("text", ["[]", "7", ""])
def test_a_file_that_holds_something_else_is_not_called_a_plan(text, tmp_path):
    file = tmp_path / "s.json"
    file.write_text(text)
    with pytest.raises(PlanError, match="an STA strategy") as error:
        Strategy.load(file)
    assert "plan" not in str(error.value).removeprefix(str(file))


def test_a_strategy_that_cannot_be_read_is_named_once(tmp_path):
    file = tmp_path / "missing.json"
    with pytest.raises(PlanError, match="can't be read") as error:
        Strategy.load(file)
    assert str(error.value).count("missing.json") == 1


def strategy(steps=4, layers=2, heads=2):
    window = [(3, 6, 10), (1, 1, 3), (1, 1, 3), (3, 3, 1)]
    return Strategy(tuple(((window[t],) * heads,) * layers for t in range(steps)))


@pytest.mark.parametrize("name", ["wan_ti2v", "hunyuan_i2v"])
def test_a_strategy_goes_into_a_plan_and_back(name):
    transformer, _ = BUILDERS[name]()
    sigmas = flow_sigmas(4, 5.0)
    layout = TokenLayout.video(18, 48, 80)
    found = strategy(layers=len(self_attention_layers(transformer)))
    plan = import_sta(found, transformer, sigmas, layout)
    (part,) = plan.components.values()
    assert len(part.stages) == 3
    assert part.layers[next(iter(part.layers))][0][0].pattern.is_dense
    assert plan.density == pytest.approx(
        sum(density(s[0][0], layout.grid) for s in found.windows) / 4
    )
    again = Plan.from_dict(plan.to_dict())
    assert export_sta(again, sigmas_of(again, 4, None)).strategy == found
    # another schedule of the same model finds the same stages
    assert export_sta(plan, flow_sigmas(8, 5.0)).strategy.windows[::2] == found.windows


def test_a_strategy_for_another_model_is_refused():
    transformer, _ = BUILDERS["wan_ti2v"]()
    layout = TokenLayout.video(18, 48, 80)
    with pytest.raises(PlanError, match="3 layers of 2 heads"):
        import_sta(strategy(layers=3), transformer, flow_sigmas(4, 5.0), layout)
    with pytest.raises(PlanError, match="give --steps 4"):
        import_sta(strategy(), transformer, flow_sigmas(5, 5.0), layout)
    with pytest.raises(PlanError, match="fall"):
        import_sta(strategy(), transformer, [0.1, 0.2, 0.3, 0.4], layout)


def test_the_commands_write_both(tmp_path, capsys):
    plan, file = tmp_path / "plan.json", tmp_path / "s.json"
    windows_plan().save(plan)
    assert cli.run(["show", str(plan), "--export-sta", str(file), "--steps", "4"]) == 2
    assert "--flow-shift" in capsys.readouterr().err
    shift = ["--steps", "4", "--flow-shift", "1"]
    assert cli.run(["show", str(plan), "--export-sta", str(file), *shift]) == 0
    assert "had to be made dense" in capsys.readouterr().out
    assert Strategy.load(file).shape == (4, 3, 2)
    assert cli.run(["show", str(plan), "--export-sta", str(file)]) == 2

    tiny, found, made = str(shipped("tiny_wan")), tmp_path / "t.json", tmp_path / "p.json"
    size = ["--height", "64", "--width", "64", "--num-frames", "7", "--max-sequence-length", "32"]
    write = ["plan", tiny, "--from-sta", str(found), "--out", str(made), *size]
    Strategy(tuple((((1, 1, 1),) * HEADS,) * LAYERS for _ in range(4))).save(found)
    assert cli.run([*write, "--steps", "5"]) == 2
    assert cli.run([*write, "--density", "0.3"]) == 2
    assert cli.run(write) == 0
    assert len(Plan.load(made).components["transformer"].layers) == LAYERS
