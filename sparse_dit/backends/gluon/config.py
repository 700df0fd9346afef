"""Block sizes of the Gluon kernel. None of them was timed: they are what compiles without spills."""

from __future__ import annotations

from typing import NamedTuple

ROWS = 64  # query rows of a consumer: one warpgroup's product


class Config(NamedTuple):
    """How the kernel is launched.

    Args:
        consumers: Warpgroups that compute, 1 or 2, of `ROWS` query rows each.
        block_n: The keys of a step.
        stages: How many steps of keys, and of values, fit into shared memory at once.
        registers: The registers of a thread as a block starts. Then the warps that load keep 24, and those
            that compute share the others: with 2 consumers 240 each. With 1 two blocks fit into a
            multiprocessor.
    """

    consumers: int
    block_n: int
    stages: int
    registers: int

    @property
    def block_m(self) -> int:
        """The query rows of a tile."""
        return ROWS * self.consumers


# head_dim -> (for small tiles, for large tiles)
CONFIGS = {
    64: (Config(1, 64, 4, 128), Config(2, 128, 3, 168)),
    128: (Config(1, 64, 3, 128), Config(2, 128, 2, 168)),
}
# the same where 128 keys a step spill
NARROW = {
    64: (Config(1, 64, 4, 128), Config(2, 64, 4, 168)),
    128: (Config(1, 64, 3, 128), Config(2, 64, 3, 168)),
}


def configs_for(head_dim: int, *, far: bool, masked: bool) -> tuple[Config, Config]:
    """Configurations for small and for large tiles.

    Args:
        head_dim: 64 or 128.
        far: Whether there are pooled keys.
        masked: Whether there are row intervals.
    """
    return (NARROW if far and (masked or head_dim == 64) else CONFIGS)[head_dim]
