"""What a host library's attention layer hands over: the tensors, and where in the run it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from .intervals import RowIntervals, valid_rows
from .layout import Tile, TokenLayout
from .modalities import Modalities

Branch = Literal["any", "cond", "uncond"]
Phase = Literal["any", "prefill", "decode"]


@dataclass(frozen=True)
class StepContext:
    """Where one forward of a transformer stands in a generation. A new object for each forward.

    Args:
        layout: The sequence of self-attention; None if the forward's arguments don't tell it.
        sigma: Noise level of the forward, timestep / num_train_timesteps, in [0, 1]; None before
            the first forward. The largest one where tokens or batch items differ. 1 in a language model.
        branch: Half of classifier-free guidance; "any" if both are in the batch, or unknown.
        run: Counts generations from 0. Its pipeline's scheduler tells where one starts; where no pipeline is
            known, it does when the noise level rises or starts anew.
        step: Counts the denoising steps that this transformer took in the run, from 0.
        condition: Number of the tensor object that the forward is conditioned on, never given twice: another
            number may be another generation. None if there is none. It doesn't count in comparisons.
            One object gets another number where it can't be told whether another generation has begun.
        phase: In a language model: `"decode"` for one query, else `"prefill"`. `"any"` for other models.
        modalities: Where images and videos lie among a VLM's keys, for each item of the batch; empty for
            other models, and for layers that keep the last keys alone. It doesn't count in comparisons.
        active: In a diffusion language model: so many last tokens are being denoised; `sigma` is the share of
            them that is masked still, and the layout has two segments, prompt and generated tokens. 0 for
            other models.
        sorted_by: The tile by which the tokens have been sorted before the first layer; None if they lie as
            `layout` says.
    """

    layout: TokenLayout | None = None
    sigma: float | None = None
    branch: Branch = "any"
    run: int = -1
    step: int = -1
    condition: int | None = field(default=None, compare=False)
    phase: Phase = "any"
    modalities: tuple[Modalities, ...] = field(default=(), compare=False)
    active: int = 0
    sorted_by: Tile | None = None


class Split(Protocol):
    """How tokens and heads lie on several processes; `attend` gives this one's output and the backend."""

    @property
    def num_tokens(self) -> int: ...

    attend: Callable[..., tuple[Tensor, str]]


@dataclass(slots=True)
class AttentionCall:
    """One call of attention: B batch, N tokens, H heads, D head_dim.

    Args:
        layer: Module path of the attention layer in its transformer.
        q, k, v: `[B, N, H, D]` after norms and rotary embedding; views, don't write to them.
            k and v may have fewer heads, of which H is a multiple, and v may be of another width.
        attn_mask: The host's mask as it came, or None.
        kv_len: int64 `[B]` if the mask says no more than "the first kv_len keys are valid"; None
            if every key is valid.
        scale: Factor of the logits; None is `D ** -0.5`.
        context: The layout, noise level, branch, run and step of the forward.
        unsupported: Why only `stock` computes what the host asked for (dropout, a dense mask,
            context parallelism, ...); None if attention over the keys that `intervals` names is all.
        stock: Computes exactly what the unpatched layer would: `[B, N, H, D]`.
        bias: float `[B, N]` whose outer product is added to an item's logits; None for nothing.
        split: How tokens and heads lie on several processes, if context parallelism is all that is
            unsupported; q, k, v then hold this process' tokens.
        rows: What the mask says, or causal order, where it is more than `kv_len`: int32 `[B, N]`.
        sinks: float `[H]`: a logit that takes part in each row's softmax without a key; None for none.
    """

    layer: str
    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None
    kv_len: Tensor | None
    scale: float | None
    context: StepContext
    unsupported: str | None
    stock: Callable[[], Tensor]
    bias: Tensor | None = None
    split: Split | None = None
    rows: RowIntervals | None = None
    sinks: Tensor | None = None

    @property
    def intervals(self) -> RowIntervals | None:
        """The keys that each row may see: `[B, N]` on the device of q; None if each sees all."""
        if self.kv_len is None:
            return self.rows
        return valid_rows(self.kv_len.to(self.q.device), self.q.shape[1])


def item_of(call: AttentionCall, b: int, condition: int | None = None) -> AttentionCall:
    """One batch item of a language model's call, as a call of its own, under a condition of its own."""
    rows = call.rows
    if rows is not None:
        found = rows.cache.get(("item", b))
        if found is None:
            parts = (None if x is None else x[b : b + 1] for x in (rows.start, rows.stop))
            found = rows.cache[("item", b)] = RowIntervals(*parts)
        assert isinstance(found, RowIntervals)
        rows = found
    mask, context = call.attn_mask, call.context
    return replace(
        call,
        q=call.q[b : b + 1],
        k=call.k[b : b + 1],
        v=call.v[b : b + 1],
        attn_mask=mask if mask is None or len(mask) == 1 else mask[b : b + 1],
        context=replace(context, modalities=context.modalities[b : b + 1], condition=condition),
        stock=lambda: call.stock()[b : b + 1],
        rows=rows,
    )


Intercept = Callable[[AttentionCall], Tensor]


def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, ...]:
    """q, k, v whose logits at `scale` are those of the given ones plus the bias' outer product.

    Eight channels are appended, so that kernels' vectors stay whole; those of v are 0.

    Args:
        q, k, v: `[B, N, H, D]`.
        bias: `[B, N]`.
        scale: Factor of the logits.
    """
    extra = q.new_zeros(*q.shape[:3], 8)
    query, key = extra.clone(), extra.clone()
    query[..., 0] = (bias / scale).to(q.dtype)[:, :, None]
    key[..., 0] = bias.to(q.dtype)[:, :, None]
    return torch.cat([q, query], -1), torch.cat([k, key], -1), torch.cat([v, extra], -1)
