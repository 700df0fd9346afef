"""What was measured, as rows: each pattern on each backend, beside PyTorch's own attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One pattern on one backend; times are medians of seconds a call, batch 1.

    Args:
        backend: A name in `BACKENDS`.
        pattern: What the queries see; `+mass` if the exact block mass was computed too.
        tokens: The tokens N of the sequence, queries and keys alike.
        head_dim, heads, dtype: The channels D, the heads H and the dtype of q, k and v.
        threads: The number of CPU threads that computed.
        density: Computed pairs over all pairs; a pooled key counts as one.
        seconds: What a call of the backend takes.
        sdpa_seconds: What PyTorch's dense attention takes on the same tensors.
        flex_seconds: What compiled FlexAttention takes with the same lists; None if not measured.
        dense_seconds: What the backend takes when everything is computed.
        speedup: `sdpa_seconds / seconds`.
        efficiency: `speedup * density`: 1 if a pair costs what it costs in SDPA.
        dense_efficiency: `dense_seconds / seconds * density`: 1 if a pair costs what it costs in the
            backend's dense mode.
        flex_speedup: `flex_seconds / seconds`.
        gflops: 1e9 operations a second in the two products of attention with N queries and M keys:
            `4 * N * M * D * H * density / seconds / 1e9`.
        sgemm_gflops: torch's float32 matrix product of 2048 x 2048 in the same rounds; None for other
            dtypes.
        error: Relative L2 error of sampled rows against float64.
        samples: How many times a call was timed for `seconds`.
        spread: The distance between the quartiles of these times, over their median.
        foreign_cores: Mean number of cores that others used meanwhile; None if that isn't known.
    """

    backend: str
    pattern: str
    tokens: int
    head_dim: int
    heads: int
    dtype: str
    threads: int
    density: float
    seconds: float
    sdpa_seconds: float
    flex_seconds: float | None
    dense_seconds: float
    speedup: float
    efficiency: float
    dense_efficiency: float
    flex_speedup: float | None
    gflops: float
    sgemm_gflops: float | None
    error: float
    samples: int
    spread: float
    foreign_cores: float | None

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Skipped:
    """A pattern that a backend can't run.

    Args:
        backend, pattern, head_dim, dtype: The call that was left out; see `Row`.
        reason: Why the backend can't run it, in the backend's own words.
    """

    backend: str
    pattern: str
    head_dim: int
    dtype: str
    reason: str

    def to_dict(self) -> dict[str, object]:
        """JSON form."""
        return dataclasses.asdict(self)
