"""What attention costs on GPUs that nobody here has, estimated from published measurements of others.

Dense times of FlexAttention (head_dim 128, bfloat16, one head, tiles of 128 x 64) that Tencent published for
flex-block-attn (https://github.com/Tencent-Hunyuan/flex-block-attn, `benchmark/full`) give the constants of
`TileModel`; what its sparse calls (`benchmark/dynamic/random`, 60 % of blocks, and `benchmark/static/swa`)
took over that model's forecast is the error band. So relative costs of one kernel, sparse against dense, are
all that this tells: nothing was measured by this project, and nothing is said of which kernel is faster.
`python -m benchmarks.published` writes the tables that ship as `profiles/devices/{h100,h800,h20}.json`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.tile_model import TileModel, fit
from sparse_dit.search.device_table import DeviceTable, Entry

HEAD_DIM, DTYPE, HEADS = 128, "bfloat16", 16
BLOCK_Q, BLOCK_K = 128, 64
DENSITIES = (0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
TOKENS = (11520, 19200, 30720, 38400, 46080, 53760, 61440, 69120, 76800, 84480)
GRIDS = ((16, 24, 30), (20, 30, 32), (20, 32, 48), (24, 40, 64), (22, 60, 64))  # sizes of the table


@dataclass(frozen=True)
class Published:
    """One GPU.

    Args:
        measured_on: Its name in the publication.
        multiprocessors: Of it.
        dense: Milliseconds of a dense call of one head, for each size in `TOKENS`.
        band: Least and most of measured over forecast time of its published sparse calls.
        factor: Of sparse times in the table: the median of the same.
    """

    measured_on: str
    multiprocessors: int
    dense: tuple[float, ...]
    band: tuple[float, float]
    factor: float


H800 = Published(
    "H800",
    132,
    (0.2189, 0.6859, 1.0888, 2.0157, 2.4313, 3.7470, 4.3040, 5.9962, 6.7267, 7.5175),
    (1.06, 1.13),
    1.13,
)
H20 = Published(
    "H20",
    78,
    (0.9674, 1.6021, 5.0740, 6.3519, 9.5067, 13.2896, 17.7008, 20.0395, 25.3833, 31.3238),
    (0.94, 0.99),
    0.98,
)
DEVICES = {"h100": H800, "h800": H800, "h20": H20}  # an H100 has as many multiprocessors as an H800


def model_of(name: str) -> TileModel:
    """The model fitted to a GPU's dense calls."""
    gpu = DEVICES[name]
    calls = [(n, 1, 1e-3 * ms) for n, ms in zip(TOKENS, gpu.dense, strict=True)]
    return fit(calls, gpu.multiprocessors, BLOCK_Q, BLOCK_K)


def estimated_table(name: str) -> DeviceTable:
    """The table of a GPU in `DEVICES`; its `caveat` says what it is worth."""
    gpu = DEVICES[name]
    return DeviceTable(
        name=f"{name}-estimate",
        device="cuda",
        processor=f"{name.upper()}, estimated",
        threads=1,
        backend="flex",
        heads=HEADS,
        caveat=caveat(name),
        entries=tuple(_entry(grid, model_of(name), gpu.factor) for grid in GRIDS),
    )


def caveat(name: str) -> str:
    """What must be said wherever the table is used."""
    gpu = DEVICES[name]
    low, high = gpu.band
    other = "" if name == gpu.measured_on.lower() else f", taken for an {name.upper()}"
    return (
        f"costs for {name} are an estimate, measured on no GPU by this project: a model fitted to "
        f"FlexAttention's dense times published for an {gpu.measured_on}{other} (head_dim 128, bfloat16). "
        f"Published sparse calls took {low:g} to {high:g} times the model's forecast, and those of other "
        "kernels 0.88 to 1.28 times; only sparse against dense of one kernel is told, with no cost of "
        "sorting tokens. Measure on the device before relying on it: sparse-dit bench cost --device cuda"
    )


def _entry(grid: tuple[int, int, int], model: TileModel, factor: float) -> Entry:
    tokens = grid[0] * grid[1] * grid[2]
    dense = model.uniform(tokens, HEADS) / HEADS
    points = tuple(
        (density, model.uniform(tokens, HEADS, density) * factor / HEADS) for density in DENSITIES
    )
    return Entry(
        grid=grid,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        dense=dense,
        dense_head=dense,
        masked=points,
        far_field=points,  # pooled keys count in the density as others do
    )


def main() -> None:
    """Write the tables."""
    folder = Path(__file__).parents[1] / "profiles" / "devices"
    for name in DEVICES:
        estimated_table(name).save(folder / f"{name}.json")


if __name__ == "__main__":
    main()
