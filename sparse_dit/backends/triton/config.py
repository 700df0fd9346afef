"""Block sizes, warps and stages for each architecture: a table, so that no first call searches for them.

Those of sm_90 were chosen by their times on an H200 (`docs/measurements/`), the others by what the kernels
compile to (no spills, tensor cores, shared memory within bounds), as
`tests/gpu_without_gpu/test_triton_compiled.py` checks.
"""

from __future__ import annotations

from typing import NamedTuple


def power_of_two(n: int) -> int:
    """The least one that isn't below n."""
    return 1 << (n - 1).bit_length()


class Config(NamedTuple):
    """How a kernel is launched.

    Args:
        block_m: The query rows of a tile.
        block_n: The keys that are loaded in one step of the loop over keys.
        warps: Triton's `num_warps`: how many warps a program has.
        stages: Triton's `num_stages`: how many steps of the loop are loaded ahead.
        whole: Whether channels are one piece, padded to a power of two and at least 64. Else they are
            two, which saves products; on sm_90 `ptxas` (12.8) then makes wrong code for narrow pieces.
        masked_ahead: Whether pooled keys are loaded ahead where rows have intervals. On AMD's that spills.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    whole: bool = False
    masked_ahead: bool = True

    def channels(self, head_dim: int) -> tuple[int, int]:
        """Widths of the pieces that a kernel handles channels in; the second is 0 if there is one."""
        if self.whole:
            return max(64, power_of_two(head_dim)), 0
        first = 1 << (head_dim.bit_length() - 1)
        if head_dim == first:
            return first, 0
        return first, max(16, power_of_two(head_dim - first))


# architecture -> head_dim up to -> (for small tiles, for large tiles); the same twice where tiles of 128
# rows spill
CONFIGS: dict[str, dict[int, tuple[Config, Config]]] = {
    "sm80": {
        64: (Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
        96: (Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
        128: (Config(64, 64, 8, 2), Config(128, 32, 8, 3)),
    },
    "sm86": {  # and sm_89
        64: (Config(128, 64, 8, 3), Config(128, 64, 8, 3)),
        96: (Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
        128: (Config(64, 32, 4, 3), Config(64, 32, 4, 3)),
    },
    "sm90": {
        64: (Config(64, 64, 4, 4, True), Config(64, 64, 4, 4, True)),
        128: (Config(64, 64, 4, 3, True), Config(128, 64, 8, 3, True)),
    },
    "sm100": {
        64: (Config(64, 64, 4, 3), Config(128, 64, 8, 3)),
        96: (Config(64, 128, 8, 2), Config(128, 64, 8, 3)),
        128: (Config(64, 128, 8, 2), Config(128, 64, 8, 3)),
    },
    "sm120": {
        64: (Config(64, 64, 8, 3), Config(128, 64, 8, 2)),
        96: (Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
        128: (Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    },
    "gfx9": {
        64: (Config(64, 64, 4, 2, masked_ahead=False), Config(128, 64, 8, 3, masked_ahead=False)),
        96: (Config(64, 64, 4, 2, masked_ahead=False), Config(64, 64, 4, 2, masked_ahead=False)),
        128: (Config(64, 64, 4, 2, masked_ahead=False), Config(128, 32, 8, 3, masked_ahead=False)),
    },
}
CAPABILITIES = {
    (8, 0): "sm80",
    (8, 6): "sm86",
    (8, 7): "sm86",
    (8, 9): "sm86",
    (9, 0): "sm90",
    (10, 0): "sm100",
    (10, 3): "sm100",
    (12, 0): "sm120",
    (12, 1): "sm120",
}
CDNA = ("gfx942", "gfx950")


def configs_for(architecture: str, head_dim: int) -> tuple[Config, Config]:
    """Configurations for small and for large tiles.

    Raises:
        KeyError: If the architecture isn't in the table.
        ValueError: If the head_dim is larger than the table's.
    """
    for largest, configs in CONFIGS[architecture].items():
        if head_dim <= largest:
            return configs
    raise ValueError(f"head_dim must be at most {max(CONFIGS[architecture])}, got {head_dim}")
