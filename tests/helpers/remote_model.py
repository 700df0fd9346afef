"""A small language model whose code lies in its folder, as LLaDA's and Dream's do; it sees both ways."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class SmallConfig(PretrainedConfig):
    """Sizes; `calls` says whom attention calls: `"interface"` or `"torch"`."""

    model_type = "small_remote"

    def __init__(self, calls: str = "interface", **more: Any) -> None:
        self.calls = calls
        self.vocab_size, self.hidden_size, self.num_hidden_layers = 128, 64, 2
        self.num_attention_heads, self.max_position_embeddings = 4, 4096
        super().__init__(**more)


def eager_attention_forward(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as older remote code has it beside the interface."""
    scores = q @ k.mT * scaling + (0 if mask is None else mask)
    weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2), weights


class SmallAttention(nn.Module):
    """Looks the function up by its name, as code for transformers 4 does."""

    def __init__(self, config: SmallConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def split(self, x: Tensor) -> list[Tensor]:
        """q, k, v `[B, H, N, D]`."""
        parts = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        return [part.transpose(1, 2) for part in parts]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention's share of a layer."""
        attend: Any = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        found, _ = attend(self, *self.split(x), mask, scaling=self.head_dim**-0.5)
        return self.out(found.flatten(2))


class SmallSdpaAttention(SmallAttention):
    """Calls PyTorch itself, so that nothing can take its place."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention's share of a layer."""
        found = F.scaled_dot_product_attention(*self.split(x), attn_mask=mask)
        return self.out(found.transpose(1, 2).flatten(2))


class SmallModel(PreTrainedModel):
    """Token ids to logits."""

    config_class = SmallConfig
    _supports_sdpa = True

    def __init__(self, config: SmallConfig) -> None:
        super().__init__(config)
        kind = SmallAttention if config.calls == "interface" else SmallSdpaAttention
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(kind(config, i) for i in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Logits `[B, N, V]`; a mask `[B, N]` has 0 where a token is padding."""
        n = input_ids.shape[1]
        x = self.tokens(input_ids) + self.places(torch.arange(n, device=input_ids.device))
        mask = None
        if attention_mask is not None and not attention_mask.all():
            seen = attention_mask[:, None, None].bool()
            mask = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, -torch.inf)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, x.shape[-1:]), mask)
        return CausalLMOutput(logits=self.head(x))
