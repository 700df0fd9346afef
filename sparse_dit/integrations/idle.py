"""Attention and a forward that do nothing, with the seam and without: what is left is what the seam costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from ..call import Intercept, StepContext
from .attachment import attach
from .processors import Seam, Tap, wrap

SEEN: list[Tensor] = []  # q, k and v as the attention function got them last


def dispatch_attention_fn(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    """An attention function of the host's name that does nothing."""
    SEEN[:] = query, key, value
    return value


class _Processor:
    """Hands q, k and v to its attention function as a processor of the host does."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dispatch_attention_fn(
            q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, backend=None,
            parallel_config=None,
        )  # fmt: skip


def calls(
    q: Tensor, k: Tensor, v: Tensor, layer: str, context: StepContext, intercept: Intercept
) -> tuple[Callable[[], object], Callable[[], object]]:
    """A stock processor's call, and one whose attention goes to `intercept` first."""
    stock = _Processor()
    patched = wrap(stock, Seam(layer, Tap(intercept, context)))
    return (lambda: stock(q, k, v)), (lambda: patched(q, k, v))


def forward_hook() -> Callable[[], object]:
    """What an attachment runs before each forward of a transformer."""
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=8, num_layers=30, text_dim=8
    )
    attachment = attach(transformer, lambda call: call.stock())
    inputs = {
        "hidden_states": torch.zeros(1, 16, 21, 60, 104),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.zeros(1, 4, 8),
    }
    hook: Any = attachment._before_forward  # pyright: ignore[reportAttributeAccessIssue]
    return lambda: hook(transformer, (), inputs)
