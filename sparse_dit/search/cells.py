"""Exact attention of a few sampled rows, summed by key cells: enough to evaluate any pattern.

For a row with softmax weights p over all keys, a cell c has mass `sum(p)`, value sum `sum(p * v)` and a
pooled weight (what its mean key would get). What any mask of cells computes, with or without the far
field, is then a sum over cells: no sparse kernel is needed, and hundreds of candidates cost little.

Letters in shapes: R sampled rows, C cells, D head_dim, K candidates. What belongs to a head may be of several
at once, `[h, ...]`: a GPU computes many together, a processor does them one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from ..layout import Tile, TokenLayout, tile_order


@dataclass(frozen=True, eq=False)
class CellTable:
    """A layout's grid tokens in one order, cut into cells (whole tiles).

    Args:
        tokens: int64 `[C, n]`, the tokens of each cell; smaller cells repeat their first token.
        real: float32 `[C, n]`, 0 for repeats.
        global_tokens: int64 `[num_global]`, the tokens outside of all cells.
        counts: int64 `[3]`, cells along frames, rows and columns.
        place: int64 `[C, 3]`, each cell's place in that lattice.
        cell_of_token: int64 `[N]`, -1 for global tokens.
        ragged: Whether there are repeats.
    """

    tokens: Tensor
    real: Tensor
    global_tokens: Tensor
    counts: Tensor
    place: Tensor
    cell_of_token: Tensor
    ragged: bool

    def to(self, device: torch.device) -> CellTable:
        """The same with `tokens`, `real` and `global_tokens`, by which sums are taken, on a device."""
        summed_by = (self.tokens, self.real, self.global_tokens)
        tokens, real, global_tokens = (x.to(device) for x in summed_by)
        return replace(self, tokens=tokens, real=real, global_tokens=global_tokens)


CPU = torch.device("cpu")


@functools.lru_cache(maxsize=32)
def cell_table(layout: TokenLayout, tile: Tile, device: torch.device = CPU) -> CellTable:
    """Cells of `layout` for tiles of this size; what sums are taken by lies on `device`."""
    if device != CPU:
        return cell_table(layout, tile).to(device)
    order = tile_order(layout, tile)
    offsets, total = order.tile_offsets, layout.seq_len
    sizes = offsets.diff()
    rank = torch.arange(int(sizes.max()))
    real = rank < sizes[:, None]
    where = offsets[:-1, None] + torch.where(real, rank, 0) + order.global_before
    tokens = order.order[where]
    cell_of_token = torch.full((total,), -1)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    cells = order.order[order.global_before : order.global_before + layout.num_grid]
    cell_of_token[cells] = owner
    size = torch.tensor(order.tile)
    place = order.boxes().lo // size
    return CellTable(
        tokens,
        real.float(),
        (cell_of_token < 0).nonzero()[:, 0],
        -(-torch.tensor(order.grid) // size),
        place,
        cell_of_token,
        not bool(real.all()),
    )


@dataclass(frozen=True, eq=False)
class CellSums:
    """Sums over cells of the sampled rows of one head, or of several, `[h, ...]`.

    Args:
        mass: `[R, C]`, softmax probability of each cell.
        exact: `[R, C, D]`, `sum(p * v)` of each cell.
        pooled: `[R, C]`, what the cell's mean key (logit plus log of its size) would get; of all of its
            mean keys, if there are several.
        far_output: `[R, C, D]`, mean values times that.
        global_mass, global_value: `[R]`, `[R, D]`: mass and value sum of the global tokens.
        out: `[R, D]`, the exact output.
        cell: int64 `[R]`, the cell that each row lies in, on the CPU.
    """

    mass: Tensor
    exact: Tensor
    pooled: Tensor
    far_output: Tensor
    global_mass: Tensor
    global_value: Tensor
    out: Tensor
    cell: Tensor

    def outputs(self, seen: Tensor, far: bool) -> Tensor:
        """What candidates compute, `[K, R, D]`; see `outputs_and_recall`."""
        return self.outputs_and_recall(seen, far)[0]

    def outputs_and_recall(self, seen: Tensor, far: bool) -> tuple[Tensor, Tensor]:
        """What candidates compute, `[K, R, D]`, and the attention mass they see exactly, `[K, R]`.

        Args:
            seen: bool `[K, R, C]`, cells that each row sees exactly.
            far: Whether the other cells are seen pooled.
        """
        weight = seen.to(self.mass.dtype).transpose(-3, -2)  # [R, K, C]
        mass, exact = self.mass[..., None], self.exact
        columns = [exact, mass]
        if far:  # what seeing a cell exactly changes
            columns = [exact - self.far_output, mass - self.pooled[..., None], mass]
        sums = weight @ torch.cat(columns, -1)  # [R, K, D + 1 or 2]: one product for all
        value, norm = sums[..., : exact.shape[-1]], sums[..., exact.shape[-1]]
        always, share = self.global_value, self.global_mass
        if far:
            always, share = always + self.far_output.sum(-2), share + self.pooled.sum(-1)
        norm = (norm + share[..., None]).clamp_min(1e-20)
        outputs = (value + always[..., None, :]) / norm[..., None]
        return outputs.transpose(-3, -2), (sums[..., -1] + self.global_mass[..., None]).mT

    def benefit(self, far: bool) -> Tensor:
        """Squared error of the output, to first order, if a cell is not exact, `[R, C]`.

        In units of the row's squared output. With the far field, of pooling it; else of dropping it.
        """
        return self._far_benefit if far else self._relative(self._dropped)

    @functools.cached_property
    def _far_benefit(self) -> Tensor:
        """The benefit of each cell beside a far field, `[R, C]`; cached, as finding asks for it twice."""
        kept = torch.addcmul(self._dropped, self.pooled[..., None], self.out[..., None, :])
        return self._relative(kept.sub_(self.far_output))

    @functools.cached_property
    def _dropped(self) -> Tensor:
        """By how much the output moves if a cell is left out, `[R, C, D]`."""
        return torch.addcmul(self.exact, self.mass[..., None], self.out[..., None, :], value=-1)

    def _relative(self, error: Tensor) -> Tensor:
        power = self.out.square().sum(-1, keepdim=True)
        return torch.linalg.vector_norm(error, dim=-1).square() / power.clamp_min(1e-20)


def check_finite(sums: CellSums, layer: str, heads: Sequence[int], sigma: float | None) -> None:
    """Raise a ValueError that names the first head whose output, of `[h, R, D]`, holds NaN or Inf."""
    finite = torch.isfinite(sums.out).flatten(1).all(1).tolist()
    for head, is_finite in zip(heads, finite, strict=True):
        if not is_finite:
            at = "" if sigma is None else f" at sigma {sigma:.3f}"
            raise ValueError(
                f"{layer} head {head}{at} gives NaN or Inf: "
                "the stock pipeline is broken at this size or dtype"
            )


@dataclass(frozen=True, eq=False)
class SampledRows:
    """Attention of the sampled rows of one head, or of several, over all tokens, to be summed by any cells.

    Args:
        p: `[N, R]`, softmax probabilities (0 for padding): a cell's are then whole rows in memory.
        lse: `[R]`, log of the sum of the exponentials.
        queries: `[R, D]`, multiplied by the scale of the logits.
        keys, values: `[N, D]`, contiguous.
        rows: int64 `[R]`, sampled tokens, on the CPU.
    """

    p: Tensor
    lse: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    rows: Tensor

    def by_cells(self, table: CellTable, pool: int | None = None) -> CellSums:
        """The sums over the cells of `table`.

        Args:
            table: The cells to sum by.
            pool: Largest number of tokens of a cell that one mean key stands for; None for all.
        """
        size, flat = table.tokens.shape, table.tokens.flatten()
        p, values = (
            x.index_select(-2, flat).unflatten(-2, size) for x in (self.p, self.values)
        )  # [C, n, *]
        if table.ragged:
            p = p * table.real[..., None]
        pooled, far_output = self._pooled(table, pool)
        exact = (p.mT @ values).transpose(-3, -2)  # [R, C, D]
        always = self.p[..., table.global_tokens, :]
        global_value = always.mT @ self.values[..., table.global_tokens, :]
        return CellSums(
            p.sum(-2).mT,
            exact,
            pooled,
            far_output,
            always.sum(-2),
            global_value,
            exact.sum(-2) + global_value,
            table.cell_of_token[self.rows],
        )

    def _pooled(self, table: CellTable, pool: int | None) -> tuple[Tensor, Tensor]:
        """Weight of each cell's mean keys `[R, C]`, and their mean values times that `[R, C, D]`."""
        longest = table.real.shape[1]
        length = longest if pool is None else min(pool, longest)
        tokens, real = (_by_runs(x, length) for x in (table.tokens, table.real))  # [C * P, length]
        sizes = real.sum(1)
        weight = real if table.ragged or longest % length else None
        keys, values = (
            _sums(x, tokens, weight) / sizes.clamp_min(1)[:, None] for x in (self.keys, self.values)
        )
        logits = self.queries @ keys.mT + sizes.log()
        share = (logits - self.lse[..., None]).exp()
        share = share.unflatten(-1, (len(table.tokens), -1))  # [R, C, P]
        if share.shape[-1] == 1:
            return share[..., 0], share * values[..., None, :, :]
        values = values.unflatten(-2, share.shape[-2:])
        return share.sum(-1), torch.einsum("...rcp,...cpd->...rcd", share, values)


def _sums(x: Tensor, runs: Tensor, weight: Tensor | None) -> Tensor:
    """Sums of `[..., N, D]` over runs of tokens `[n, length]`, each token weighted: `[..., n, D]`."""
    by_token = x.movedim(-2, 0)
    sums = embedding_bag(runs, by_token.flatten(1), mode="sum", per_sample_weights=weight)
    return sums.view(-1, *by_token.shape[1:]).movedim(0, -2)


def _by_runs(x: Tensor, length: int) -> Tensor:
    """`[C, n]` cut into runs of `length` along the second axis, `[C * P, length]`, 0 for what is lacking."""
    return pad(x, (0, -x.shape[1] % length)).view(-1, length)


def sampled_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, valid: int
) -> SampledRows:
    """Evaluate the sampled rows of one head exactly, or of several.

    Args:
        q, k, v: `[N, D]` of one head, `[h, N, D]` of several.
        rows: int64 `[R]`, sampled grid tokens, on the CPU.
        scale: Factor of the logits.
        valid: Tokens from here on are padding.
    """
    queries = q[..., rows, :].float() * scale
    keys, values = k.float().contiguous(), v.float().contiguous()
    p = keys @ queries.mT  # [N, R]
    p[..., valid:, :] = -torch.inf
    largest = p.amax(-2)
    total = p.sub_(largest[..., None, :]).exp_().sum(-2)
    p = p.div_(total[..., None, :])
    return SampledRows(p, largest + total.log(), queries, keys, values, rows)


def sample_rows(layout: TokenLayout, count: int, generator: torch.Generator) -> Tensor:
    """`count` grid tokens spread over the grid, int64 `[R]`, rising.

    They are drawn by stratified sampling: tokens in an order of 4 x 4 x 4 tiles are cut into equal stretches,
    and one token of each is drawn at random.
    """
    order = tile_order(layout, (4, 4, 4))
    tokens = order.order[order.global_before : order.global_before + layout.num_grid]
    count = min(count, len(tokens))
    bounds = torch.arange(count + 1) * len(tokens) // count
    jitter = torch.rand(count, generator=generator, dtype=torch.float32)
    return tokens[(bounds[:-1] + (jitter * bounds.diff()).long())].sort().values
