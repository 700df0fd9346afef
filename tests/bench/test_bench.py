"""`sparse-dit bench kernel`: what it times is right, what it writes adds up, what it refuses."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_dit import cli
from sparse_dit.attention import BACKENDS, attend
from sparse_dit.backends.cpu import library
from sparse_dit.backends.reference import token_mask
from sparse_dit.bench import flex, lists, measure, quick, truth
from sparse_dit.bench.flex import compiled, flex_call
from sparse_dit.bench.results import _field
from sparse_dit.index import SparseIndex
from sparse_dit.layout import TokenLayout
from tests.helpers.inductor import needs_inductor

TINY = ["--tokens", "256", "--head-dim", "16", "--density", "0.25", "--rounds", "2"]
TINY += ["--no-flex", "--backend", "gather", "--clock", "cpu"]
FIELDS = {
    "backend", "pattern", "tokens", "head_dim", "heads", "dtype", "threads", "density", "seconds",
    "sdpa_seconds", "flex_seconds", "dense_seconds", "speedup", "efficiency", "dense_efficiency",
    "flex_speedup", "gflops", "sgemm_gflops", "peak_gflops", "error", "samples", "spread",
    "foreign_cores",
}  # fmt: skip


def bench(*arguments):
    return cli.run(["bench", "kernel", *map(str, arguments)])


def tensors(layout, heads=1, head_dim=16, dtype=torch.float32):
    shape = (1, heads, layout.seq_len, head_dim)
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def test_rows_add_up(tmp_path, capsys):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    patterns = [word for name in lists.LISTS for word in ("--pattern", name)]
    more = ["--head-dim", 24, "--density", 0.5, "--dtype", "float32", "--dtype", "bfloat16"]
    before = torch.get_num_threads()
    assert bench(*TINY, *patterns, *more, "--json", file, "--plot", picture) == 0
    assert torch.get_num_threads() == before
    data = json.loads(file.read_text())
    assert data["version"] == 1 and data["clock"] == "cpu" and data["threads"] == 1
    assert data["environment"]["torch"] == torch.__version__ and data["environment"]["cpu"]
    assert len(data["load_averages"]) == 2 * 4 and data["quick"] == [] == data["skipped"]
    assert len(data["rows"]) == 2 * 2 * (1 + 2 * len(lists.LISTS))
    for row in data["rows"]:
        assert set(row) == FIELDS
        assert row["speedup"] == pytest.approx(row["sdpa_seconds"] / row["seconds"])
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["density"])
        own = row["dense_seconds"] / row["seconds"] * row["density"]
        assert row["dense_efficiency"] == pytest.approx(own)
        flops = 4 * 256 * 256 * row["head_dim"] * row["heads"] * row["density"]
        assert row["gflops"] == pytest.approx(1e-9 * flops / row["seconds"])
        assert (row["sgemm_gflops"] is None) == (row["dtype"] == "bfloat16")
        assert (row["peak_gflops"] is None) == (row["dtype"] == "bfloat16" or not library.LIBRARY)
        assert row["flex_seconds"] is row["flex_speedup"] is None
        assert row["error"] < 1e-2 and row["samples"] >= 2 and row["threads"] == 1
    dense = [row for row in data["rows"] if row["pattern"] == "dense"]
    assert all(row["density"] == 1 and row["dense_efficiency"] == 1 for row in dense)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "of torch's sgemm" in capsys.readouterr().out


def test_quick_fills_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quick, "TOKENS", TokenLayout.video(8, 16, 16))
    monkeypatch.setattr(quick, "DIAGONAL_TOKENS", TokenLayout.video(4, 6, 10))
    monkeypatch.setattr(quick, "HEAD_DIMS", (16, 32))
    monkeypatch.setattr(quick, "SECONDS", 0.1)
    file = tmp_path / "quick.json"
    options = ["--backend", "gather", "--clock", "cpu", "--no-flex", "--json", file]
    assert bench("--quick", *options) == 0
    data = json.loads(file.read_text())
    assert len(data["quick"]) == 2 * len(quick.MEASURES)
    missing = {value["measure"] for value in data["quick"] if value["value"] is None}
    assert missing == {"vs FlexAttention, same lists, 25 %"}
    rows = {
        (r["head_dim"], r["pattern"], r["dtype"], round(r["density"], 2)): r for r in data["rows"]
    }
    values = {(v["head_dim"], v["measure"]): v for v in data["quick"]}
    for head_dim, goal in ((16, 1.25), (32, 1.15)):
        field = values[head_dim, "efficiency at 25 % density"]
        assert field["value"] == rows[head_dim, "blocks", "float32", 0.25]["efficiency"]
        assert field["goal"] == goal and field["reached"] == (field["value"] >= goal)
        extra = values[head_dim, "far field, pool 64, extra on the 25 % plan"]
        seconds = [rows[(head_dim, *key)]["seconds"] for key in FAR_AND_BASE]
        assert extra["value"] == pytest.approx(100 * (seconds[0] / seconds[1] - 1))
        assert extra["reached"] == (extra["value"] <= 8)
    said = capsys.readouterr().out
    assert "backend gather" in said and "multi-diagonal" in said


def attend_in_blocks(q, k, v, block_mask):
    """FlexAttention by dense attention with a mask, which needs no compiler."""
    seen = block_mask.to_dense().repeat_interleave(64, 2).repeat_interleave(64, 3)
    return scaled_dot_product_attention(q, k, v, seen[..., : q.shape[2], : k.shape[2]].bool())


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention without a compiler; a backend of its name, too."""
    monkeypatch.setattr(flex, "compiled", lambda threads: attend_in_blocks)
    monkeypatch.setitem(BACKENDS, "flex", BACKENDS["gather"])


@pytest.mark.parametrize("backends", [["gather"], ["gather", "flex"]], ids=" and ".join)
def test_flex_attention_is_compared_with_and_is_no_row(tmp_path, capsys, uncompiled, backends):
    """What a backend is compared with may have a backend's name."""
    file = tmp_path / "bench.json"
    named = [word for name in backends for word in ("--backend", name)]
    sizes = ["--tokens", 256, "--head-dim", 16, "--density", 0.5, "--heads", 1]
    options = ["--pattern", "blocks", "--pattern", "columns", "--rounds", 1, "--clock", "cpu"]
    assert bench(*sizes, *options, *named, "--json", file) == 0, capsys.readouterr().err
    rows = json.loads(file.read_text())["rows"]
    assert {row["backend"] for row in rows} == set(backends)
    for row in rows:
        if row["pattern"] == "blocks":
            assert row["flex_seconds"] > 0
            assert row["flex_speedup"] == pytest.approx(row["flex_seconds"] / row["seconds"])
        else:
            assert row["flex_seconds"] is row["flex_speedup"] is None
    assert len(rows) == 3 * len(backends)


def test_quick_compares_with_flex_attention(capsys, monkeypatch, uncompiled):
    monkeypatch.setattr(quick, "TOKENS", TokenLayout.video(2, 16, 16))
    monkeypatch.setattr(quick, "DIAGONAL_TOKENS", TokenLayout.video(4, 6, 10))
    monkeypatch.setattr(quick, "HEAD_DIMS", (16,))
    monkeypatch.setattr(quick, "SECONDS", 0.1)
    assert bench("--quick", "--clock", "cpu") == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "vs FlexAttention, same lists" in line]
    assert re.search(r"\d\.\d+x \(2x\)", line), line


def test_a_narrow_miss_shows():
    value = quick.Value("dense", "cpu", 64, 1.2777, 1.28, "x", False)
    assert _field(value) == "1.278x (1.28x) below"
    assert _field(replace(value, value=1.31, reached=True)) == "1.31x (1.28x)"
    assert _field(replace(value, value=None, reached=None)) == "- (1.28x)"


FAR_AND_BASE = (("far", "float32", 0.26), ("blocks", "float32", 0.25))

BAD = {
    "unknown pattern": (["--pattern", "zebra"], "pattern must be one of"),
    "unknown dtype": (["--dtype", "int8"], "dtype must be one of"),
    "unknown backend": (["--backend", "warp"], "--backend must be one of"),
    "unknown clock": (["--clock", "sun"], "--clock must be one of"),
    "no density": (["--density", "0"], "density must be above 0"),
    "too dense": (["--density", "1.5"], "density must be above 0"),
    "density that is none": (["--density", "nan"], "density must be above 0"),
    "no tokens": (["--tokens", "0"], "tokens must be a number"),
    "half a grid": (["--tokens", "8x30"], "tokens must be a number"),
    "tokens in words": (["--tokens", "many"], "tokens must be a number"),
    "too many tokens": (["--tokens", "99999999"], "tokens"),
    "no heads": (["--heads", "0"], "heads"),
    "no rounds": (["--rounds", "0"], "rounds"),
    "threads by the cpu clock": (["--threads", "2"], "leave out --threads"),
    "quick with sizes": (["--quick"], "leave out --tokens, --head-dim, --density"),
    "results elsewhere": (["--json", "/proc/x.json"], "--json: /proc/x.json can't be written"),
    "results that aren't JSON": (["--json", "x.txt"], ".json"),
    "plot that isn't PNG": (["--plot", "x.json"], ".png"),
    "results exist": (["--json", "taken.json"], "--force"),
    "plot exists": (["--plot", "taken.png"], "--force"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for file in ("taken.json", "taken.png"):
        (tmp_path / file).write_text("precious")
    arguments, message = BAD[name]
    assert bench(*TINY, *arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["taken.json", "taken.png"]
    assert (tmp_path / "taken.json").read_text() == "precious"


def test_force_replaces(tmp_path):
    file = tmp_path / "bench.json"
    file.write_text("old")
    assert bench(*TINY, "--pattern", "blocks", "--json", file, "--force") == 0
    assert json.loads(file.read_text())["rows"]
    assert list(tmp_path.iterdir()) == [file]


def test_a_wrong_result_is_an_error_and_no_row(tmp_path, capsys, monkeypatch):
    def wrong(*arguments):
        result = right(*arguments)
        return result._replace(out=result.out * 1.001)

    right = BACKENDS["gather"].forward
    monkeypatch.setattr(BACKENDS["gather"], "forward", wrong)
    file = tmp_path / "bench.json"
    assert bench(*TINY, "--json", file) == 1
    assert "backend 'gather' (dense, 256 tokens" in capsys.readouterr().err
    assert not file.exists()


def test_what_a_backend_refuses_is_said(tmp_path, capsys, monkeypatch):
    def unsupported(q, index):
        return "no far field today" if index.entries[0].far else None

    monkeypatch.setattr(BACKENDS["gather"], "unsupported", unsupported)
    file = tmp_path / "bench.json"
    assert bench(*TINY, "--pattern", "far", "--pattern", "blocks", "--json", file) == 0
    assert "skipped gather (far float32): no far field today" in capsys.readouterr().out
    data = json.loads(file.read_text())
    assert [row["pattern"] for row in data["rows"]] == ["dense", "blocks"]
    assert data["skipped"][0]["reason"] == "no far field today"
    monkeypatch.setattr(BACKENDS["gather"], "unsupported", lambda q, index: "not today")
    assert bench(*TINY) == 2
    assert "nothing could be measured: gather: not today" in capsys.readouterr().err


def test_bench_has_help(capsys):
    assert cli.run(["bench", "--help"]) == 0
    assert "kernel" in capsys.readouterr().out
    assert bench("--help") == 0
    assert "--quick" in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [256, 300])
def test_random_blocks_are_equally_many_with_their_own(tokens):
    index = lists.build("blocks", lists.layout_of(str(tokens)), 2, 0.5, 0)
    blocks = -(-tokens // 64)
    masks = [token_mask(entry)[0] for entry in index.entries]
    assert not torch.equal(*masks)
    for mask in masks:
        small = mask[::64, ::64]
        assert small.diagonal().all() and (small.sum(1) == round(0.5 * blocks)).all()
        grown = small.repeat_interleave(64, 0).repeat_interleave(64, 1)[:tokens, :tokens]
        assert torch.equal(mask, grown)


def test_the_far_field_is_what_the_blocks_leave_out():
    layout = lists.layout_of("300")
    plain, far = (lists.build(name, layout, 1, 0.5, 0).entries[0] for name in ("blocks", "far"))
    exact, pooled = token_mask(far)
    assert torch.equal(exact, token_mask(plain)[0])
    assert torch.equal(pooled, ~exact[:, ::64])
    assert far.far.cell_offsets.tolist() == [0, 64, 128, 192, 256, 300]


def test_columns_are_the_same_for_all_queries():
    index = lists.build("columns", TokenLayout.video(2, 8, 10), 3, 0.05, 0)
    mask = token_mask(index.entries[0])[0]
    assert index.head_to_pattern == (0, 0, 0) and (mask == mask[0]).all()
    assert mask[0].sum() == 8


def test_the_multi_diagonal_is_one_run_of_keys():
    layout = TokenLayout.video(8, 6, 10)
    entry = lists.multi_diagonal(layout, 1, 2).entries[0]
    pixel = torch.arange(layout.seq_len) % 60
    near = (pixel[:, None] - pixel).abs() <= 2
    mask = token_mask(entry)[0]
    assert (mask | ~near).all()  # rounded up to what rows of two pixels see
    assert (entry.run_offsets.diff() == 1).all() and (entry.q_offsets.diff() == 16).all()
    assert entry.density == pytest.approx(
        (30 * 3 - 2) / 30 * 16 / 480
    )  # three tiles each, two at the ends


@pytest.mark.parametrize("pattern", ["blocks", "columns", "diagonals", "tiles"])
@pytest.mark.parametrize("density", [0.1, 0.4])
def test_patterns_come_near_their_density(pattern, density):
    index = lists.build(pattern, TokenLayout.video(8, 32, 32), 1, density, 0)
    assert index.density == pytest.approx(density, rel=0.25)


def test_layouts():
    assert lists.layout_of("8192") == TokenLayout.video(8, 32, 32)
    assert lists.layout_of("8x30x52") == TokenLayout.video(8, 30, 52)
    assert lists.layout_of("257").seq_len == 257  # a prime


@pytest.mark.parametrize("pattern", lists.LISTS)
def test_the_check_lets_the_right_pass_and_no_other(pattern):
    layout = TokenLayout.video(4, 6, 10)
    index = lists.build(pattern, layout, 2, 0.4, 0)
    q, k, v = tensors(layout, heads=2)
    out = attend(q, k, v, index, backend="gather").out
    assert truth.check("gather", out, q, k, v, index) < 1e-5
    broken = out.clone()
    broken[0, 1, index.entries[-1].query_tokens[0]] += 0.1
    with pytest.raises(truth.WrongResult, match="must be within"):
        truth.check("broken", broken, q, k, v, index)
    broken = out.clone()
    broken[0, 0, 77] = float("nan")  # whether it is sampled or not
    with pytest.raises(truth.WrongResult):
        truth.check("broken", broken, q, k, v, index)


def test_the_check_of_block_mass():
    layout = lists.layout_of("300")
    index = lists.build("blocks", layout, 1, 0.5, 0)
    q, k, v = tensors(layout)
    mass = attend(q, k, v, index, backend="gather", mass_block=64).mass
    truth.check_mass("gather", mass, q, k, v, index, 64)
    with pytest.raises(truth.WrongResult, match="block mass"):
        truth.check_mass("broken", mass.roll(1, -1), q, k, v, index, 64)


def test_calls_take_turns_until_the_budget_is_spent(monkeypatch):
    said = []
    monkeypatch.setattr(measure, "TURN_CALLS", 1)
    runs = {name: (lambda name=name: said.append(name)) for name in "ab"}
    times = measure.interleaved(runs, clock="wall", rounds=5)
    assert said == ["a", "b"] * 5
    assert all(timing.samples == 5 and timing.seconds >= 0 for timing in times.values())
    said.clear()
    measure.interleaved(runs, clock="wall", rounds=5, budget=0.0)
    assert said == ["a", "b"] * measure.MIN_ROUNDS


def test_load_of_others(monkeypatch):
    moments = iter([10.0, 16.0])
    monkeypatch.setattr(measure, "_busy", lambda: next(moments))
    with measure.watched() as load:
        pass
    load.wall, load.own = 2.0, 3.0
    assert load.foreign_cores == 1.5
    assert (load + load).foreign_cores == 1.5
    monkeypatch.setattr(measure, "_busy", lambda: None)
    with measure.watched() as unknown:
        pass
    assert unknown.foreign_cores is None and (load + unknown).foreign_cores is None


@needs_inductor
@pytest.mark.filterwarnings("ignore")  # inductor's own, on first compilation
def test_flex_attention_gets_the_same_lists():
    layout = lists.layout_of("300")
    q, k, v = tensors(layout, heads=2)
    made = compiled(1)
    index = lists.build("blocks", layout, 2, 0.5, 0)
    call = flex_call(made, q, k, v, index)
    assert call is not None
    assert truth.check("FlexAttention", call(), q, k, v, index) < 1e-5
    other = SparseIndex(index.entries, (1, 0))
    call = flex_call(made, q, k, v, other)
    assert call is not None
    assert truth.check("FlexAttention", call(), q, k, v, other) < 1e-5
    for pattern in ("far", "columns", "tiles"):
        assert flex_call(made, q, k, v, lists.build(pattern, layout, 2, 0.3, 0)) is None


def test_flex_attention_that_does_not_compile_says_what_to_do():
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nat all")

    layout = lists.layout_of("64")
    q, k, v = tensors(layout)
    with pytest.raises(NotImplementedError, match="RuntimeError: no compiler; pass --no-flex"):
        flex_call(broken, q, k, v, lists.dense(layout, 1))


def test_the_seam_copies_nothing_and_its_cost_is_told(capsys):
    assert cli.run(["bench", "seam", "--tokens", "512", "--heads", "1", "--head-dim", "16"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"the seam adds \d+\.\d us to an attention call", said), said
    assert "512 tokens, 1 heads of 16" in said
    assert said.rstrip().endswith("; 0 copies of q, k and v")
