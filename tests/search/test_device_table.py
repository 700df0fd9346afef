"""Device tables: interpolation, files good and hostile, measuring one, solving for another device."""

import json
import math

import pytest
import torch

from sparse_dit.generation import GenerationSettings
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Window
from sparse_dit.search import search
from sparse_dit.search.device_table import DeviceTable, Entry, slug
from sparse_dit.search.pricing import TargetDevice
from tests.helpers import tiny_pipelines

PAIR = 1e-9  # seconds a pair of tokens
SPARSE, FAR = Pattern(Window(0)), Pattern(Window(0), far=True)


def entry(grid, *, head_dim=64, dtype="float32", pair=PAIR, densities=(0.05, 0.2, 0.8)):
    tokens = math.prod(grid)
    dense = pair * tokens**2
    points = tuple((d, 2 * d * dense) for d in densities)
    far = tuple((d, 2 * d * dense + dense / 10) for d in densities)
    return Entry(
        grid=grid, head_dim=head_dim, dtype=dtype, dense=dense, dense_head=dense / 2,
        masked=points, far_field=far, index=dense / 4,
    )  # fmt: skip


def table(*entries, name="made-up"):
    return DeviceTable(
        name=name, device="cpu", processor="Made Up", threads=2, backend="cpu", heads=2,
        entries=entries or (entry((4, 16, 18)), entry((8, 24, 24))),
    )  # fmt: skip


@pytest.mark.parametrize("grid", [(4, 12, 12), (4, 16, 18), (8, 16, 16), (8, 24, 24), (12, 24, 24)])
def test_where_pairs_cost_the_same_any_size_is_met(grid):
    layout = TokenLayout.video(*grid)
    cost = table().at(layout, 64, "float32")
    dense = PAIR * layout.seq_len**2
    assert cost.dense == pytest.approx(dense)
    assert cost.seconds(Pattern(Dense()), 1.0) == pytest.approx(dense / 2)
    assert cost.index_seconds == pytest.approx(dense / 4)
    for density in (0.05, 0.13, 0.5, 1.0):
        assert cost.seconds(SPARSE, density) == pytest.approx(2 * density * dense)
    assert cost.seconds(FAR, 0.13) == pytest.approx(0.36 * dense)
    assert cost.to_dict()["device_table"] == "made-up" and cost.layout == layout


def test_between_sizes_a_pair_costs_what_lies_between_by_the_logarithm():
    both = table(entry((1, 32, 32), pair=1e-9), entry((16, 32, 32), pair=3e-9))
    middle = both.at(TokenLayout.video(4, 32, 32), 64, "float32")  # 4,096: halfway in log
    assert middle.dense == pytest.approx(2e-9 * 4096**2)
    nearer = both.at(TokenLayout.video(2, 32, 32), 64, "float32")
    assert nearer.dense == pytest.approx(1.5e-9 * 2048**2)


def test_densities_that_differ_from_size_to_size_stay_in_order():
    both = table(
        entry((1, 32, 32), densities=(0.1, 0.3, 0.7)),
        entry((16, 32, 32), densities=(0.02, 0.25, 0.6)),
    )
    points = both.at(TokenLayout.video(4, 32, 32), 64, "float32").sparse[False]
    assert [d for d, _ in points] == [0.1, 0.25, 0.3, 0.6]
    assert all(s == pytest.approx(2 * d * PAIR * 4096**2) for d, s in points)


@pytest.mark.parametrize(
    ("grid", "head_dim", "dtype", "message"),
    [
        ((8, 24, 24), 128, "float32", "must have head_dim 128 float32, it has 64 float32"),
        ((8, 24, 24), 64, "bfloat16", "--dtype bfloat16"),
        ((1, 8, 8), 64, "float32", "from 1152 to 4608 tokens, and tells nothing of 64"),
        ((16, 32, 32), 64, "float32", "nothing of 16384"),
    ],
)
def test_what_was_not_measured_is_not_guessed(grid, head_dim, dtype, message):
    layout = TokenLayout.video(*grid)
    assert not table().covers(layout.seq_len, head_dim, dtype)
    with pytest.raises(ValueError, match=message):
        table().at(layout, head_dim, dtype)


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "new" / "made-up.json"
    table().save(path)
    assert DeviceTable.load(path) == table()
    assert [file.name for file in path.parent.iterdir()] == ["made-up.json"]


def _spoiled(change):
    data = json.loads(table().model_dump_json())
    change(data)
    return json.dumps(data)


HOSTILE = {
    "empty": ("", "not valid JSON"),
    "cut": (table().model_dump_json()[:-20], "not valid JSON"),
    "binary": ("\x00\x01", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "a list": ("[]", "device table: "),
    "a plan": ('{"version": 1}', "is this file a device table"),
    "version": (_spoiled(lambda d: d.update(version=2)), "version: "),
    "unknown key": (_spoiled(lambda d: d.update(bogus=1)), "bogus: unknown key"),
    "path for a name": (_spoiled(lambda d: d.update(name="../x")), "name: must match"),
    "control characters": (_spoiled(lambda d: d.update(processor="a\x1b[2J")), "processor: "),
    "no entries": (_spoiled(lambda d: d.update(entries=[])), "entries: "),
    "text for a number": (_spoiled(lambda d: d["entries"][0].update(dense="1")), "dense: "),
    "infinite": (_spoiled(lambda d: d["entries"][0].update(dense=math.inf)), "dense: "),
    "NaN": (_spoiled(lambda d: d["entries"][0].update(dense=math.nan)), "dense: "),
    "nothing takes no time": (_spoiled(lambda d: d["entries"][0].update(dense=0.0)), "dense: "),
    "too many tokens": (
        _spoiled(lambda d: d["entries"][1].update(grid=[1 << 20] * 3)),
        r"entries\[1\].grid: must hold at most",
    ),
    "unsorted": (
        _spoiled(lambda d: d["entries"][0]["masked"].reverse()),
        "masked: must ascend in density",
    ),
    "falling": (
        _spoiled(lambda d: d["entries"][0]["far_field"].append([0.9, 1e-9])),
        "far_field: must ascend in density",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_one_clear_line(name, tmp_path):
    text, message = HOSTILE[name]
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        DeviceTable.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < 400 + len(str(path))


def test_a_table_that_is_not_there(tmp_path):
    for name in ("nowhere.json", "no-such-device", "a\0b"):
        with pytest.raises(ValueError, match="sparse-dit bench cost measures one"):
            DeviceTable.load(name)
    with pytest.raises(ValueError, match="regular file"):
        DeviceTable.load(tmp_path)


def test_the_rest_of_a_foreign_step_must_be_told():
    with pytest.raises(ValueError, match="give dense_seconds"):
        TargetDevice.of(table(), None)
    with pytest.raises(ValueError, match="device_table too"):
        TargetDevice.of(None, 3.0)
    with pytest.raises(ValueError, match="above 0"):
        TargetDevice.of(table(), math.nan)
    assert TargetDevice.of(None, None) is None
    foreign = TargetDevice(table(), 10.0)
    assert foreign.generation(measured=99.0, stock=4.0) == 10.0
    with pytest.raises(ValueError, match="at least the 12 s"):
        foreign.generation(measured=99.0, stock=12.0)
    own = TargetDevice.of(table(name=slug("cpu")), None)
    assert own is not None and own.generation(measured=7.0, stock=4.0) == 7.0


def test_a_size_beyond_the_table_has_no_cost():
    costs = TargetDevice(table(), 10.0).smaller(64, "float32")
    assert costs(TokenLayout.video(1, 4, 4)) is None
    found = costs(TokenLayout.video(4, 12, 12))
    assert found is not None and found.source == "made-up"


def test_the_name_of_this_machine_is_a_file_name():
    assert slug("cpu").endswith(f"-{torch.get_num_threads()}-thread") or "threads" in slug("cpu")
    assert table(name=slug("cpu")).here and not table().here


def test_a_plan_for_another_device(tmp_path):
    pipe = tiny_pipelines.wan()[0]
    head_dim = pipe.transformer.config.attention_head_dim
    there = table(entry((5, 4, 4), head_dim=head_dim, densities=(0.01, 0.2, 1.0), pair=1e-6))
    there.save(tmp_path / "there.json")
    settings = GenerationSettings(64, 64, 17, steps=4, guidance=3.0, max_sequence_length=16)
    options = {
        "settings": settings, "held_out": ["a harbour"], "rows": 16, "target_speedup": 1.01,
        "device_table": tmp_path / "there.json",
    }  # fmt: skip
    plan = search(pipe, ["a cat", "a dog"], dense_seconds=2.0, **options)
    assert plan.forecast["dense_seconds"] == pytest.approx(2.0)
    assert plan.cost["device_table"] == "made-up"
    assert "speedup" not in plan.measured and plan.measured["speedup_on_another_device"] > 0
    assert plan.measured["met"] is None  # a speed-up there can't be measured here
    with pytest.raises(ValueError, match=r"at least the [\d.e-]+ s that dense attention"):
        search(pipe, ["a cat", "a dog"], dense_seconds=1e-6, **options)
    other = table(entry((5, 4, 4), head_dim=head_dim + 1))
    other.save(tmp_path / "there.json")
    with pytest.raises(ValueError, match="must have head_dim"):  # before anything is profiled
        search(pipe, ["a cat"], dense_seconds=2.0, report=pytest.fail, **options)
