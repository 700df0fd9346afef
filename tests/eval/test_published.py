"""Estimated device tables: the fit to what was published, its band, and that the caveat is always told."""

import pytest

from benchmarks import published
from sparse_dit.generation import GenerationSettings
from sparse_dit.layout import TokenLayout
from sparse_dit.patterns import Dense, Pattern, Window
from sparse_dit.search import search
from sparse_dit.search.device_table import DeviceTable
from sparse_dit.search.pricing import TargetDevice
from tests.helpers import tiny_pipelines

SPARSE = {  # 60 % of blocks of 384 at random, or as said: tokens and published milliseconds of FlexAttention
    "h800": ((11520, 0.1464), (19200, 0.4699), (30720, 0.7481), (38400, 1.3797), (46080, 1.6561),
             (53760, 2.5583), (61440, 2.9271)),
    "h20": ((38400, 3.8941), (46080, 5.6588), (53760, 7.8938), (61440, 10.3365)),  # windows, 40 %
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(published.DEVICES))
def test_dense_times_are_met_within_two_percent(name):
    model, gpu = published.model_of(name), published.DEVICES[name]
    for tokens, milliseconds in zip(published.TOKENS, gpu.dense, strict=True):
        assert 1e3 * model.uniform(tokens, 1) == pytest.approx(milliseconds, rel=0.02)
    assert model.step > 0 <= model.launch


def test_the_band_is_that_of_the_published_sparse_calls():
    model, gpu = published.model_of("h800"), published.H800
    ratios = []
    for tokens, milliseconds in SPARSE["h800"]:
        blocks = tokens // 384
        density = int(blocks * 0.6) / blocks
        ratios.append(1e-3 * milliseconds / model.uniform(tokens, 1, density))
    assert min(ratios) == pytest.approx(gpu.band[0], abs=0.006)
    assert max(ratios) == pytest.approx(gpu.band[1], abs=0.006)
    assert sorted(ratios)[3] == pytest.approx(gpu.factor, abs=0.006)


def window_steps(tokens, share):
    """Steps of each tile of 128 rows; row i of blocks of 384 sees the nearest on both sides."""
    blocks = tokens // 384
    reach = int(blocks * share)
    steps = []
    for tile in range(-(-tokens // 128)):
        row = min(tile * 128 // 384, blocks - 1)
        steps.append((min(blocks - 1, row + reach - 1) - max(0, row + 1 - reach) + 1) * 384 // 64)
    return steps


def test_windows_on_the_h20_lie_in_its_band():
    model, (low, high) = published.model_of("h20"), published.H20.band
    for tokens, milliseconds in SPARSE["h20"]:
        assert low <= 1e-3 * milliseconds / model.seconds(window_steps(tokens, 0.4)) <= high


@pytest.mark.parametrize("name", sorted(published.DEVICES))
def test_table_is_relative_costs_of_one_kernel(name):
    table = DeviceTable.load(name)
    layout = TokenLayout.video(21, 30, 52)
    cost = table.at(layout, 128, "bfloat16")
    assert cost.seconds(Pattern(Dense()), 1.0) == cost.dense
    sparse = [cost.seconds(Pattern(Window(0)), d) / cost.dense for d in (0.05, 0.25, 0.5)]
    factor = published.DEVICES[name].factor
    for density, ratio in zip((0.05, 0.25, 0.5), sparse, strict=True):
        assert factor * density < ratio < factor * density + 0.03
    for kind in ((64, "bfloat16"), (128, "float32")):
        with pytest.raises(ValueError, match="must have head_dim"):
            table.at(layout, *kind)


def test_caveat_names_source_device_and_band():
    said = DeviceTable.load("h100").caveat
    assert "estimate" in said and "H800, taken for an H100" in said and "1.06 to 1.13" in said
    assert "taken for" not in DeviceTable.load("h20").caveat


def test_it_survives_a_file(tmp_path):
    file = tmp_path / "estimate.json"
    DeviceTable.load("h20").save(file)
    assert DeviceTable.load(file) == DeviceTable.load("h20")


def test_a_generation_there_must_be_given():
    with pytest.raises(ValueError, match="give dense_seconds"):
        TargetDevice.of("h100", None)
    assert TargetDevice.of("h100", 100.0).table.caveat


def test_a_search_tells_the_caveat_first():
    """Then it stops: this model's heads are too small for the table."""
    said = []
    settings = GenerationSettings(64, 64, 17, steps=4, guidance=3.0, max_sequence_length=16)
    with pytest.raises(ValueError, match="must have head_dim"):
        search(
            tiny_pipelines.wan()[0], ["a cat", "a dog"], settings=settings, max_error=0.5,
            device_table="h100", dense_seconds=1e6, report=said.append,
        )  # fmt: skip
    assert said == [published.caveat("h100")]
