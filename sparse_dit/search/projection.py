"""What an error in a head's output becomes behind the layer's output projection.

Heads' outputs are concatenated and multiplied by one matrix. An error e of head h contributes W_h e, so its
size is that of e times the symmetric root of W_h^T W_h: with values multiplied by that root, everything that
is measured of a head is measured behind the projection, at no cost a candidate.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ..integrations import heads_of, host_of, self_attention_layers


def projections(transformer: nn.Module) -> dict[str, Tensor]:
    """For each attention layer the symmetric roots of its heads' output projections, float32 `[H, D, D]`.

    A layer without an output projection of its own (blocks that project attention together with their MLP) is
    left out: its errors are then those of the heads' outputs as they are.

    Args:
        transformer: A transformer of a supported class.
    """
    result, host, sizes = {}, host_of(transformer), heads_of(transformer)
    for path, layer in self_attention_layers(transformer).items():
        weight, (num_heads, head_dim) = _weight(host.output_projection(layer)), sizes[path]
        if weight is not None and weight.ndim == 2 and weight.shape[1] == num_heads * head_dim:
            wide = weight.detach().to("cpu", torch.float64)
            heads = rearrange(wide, "out (head dim) -> head out dim", head=num_heads)
            gram = heads.mT @ heads
            values, vectors = torch.linalg.eigh(gram)
            root = vectors * values.clamp_min(0).sqrt()[:, None] @ vectors.mT
            result[path] = root.float()
    return result


def _weight(out: nn.Module | None) -> Tensor | None:
    """Weight of an output projection `[model width, H * D]`; None if it has none that can be read."""
    weight = getattr(out, "weight", None)
    if not isinstance(weight, Tensor) or weight.is_meta:
        return None
    if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point():
        return weight
    return _applied(out) if isinstance(out, nn.Linear) else None


@torch.no_grad()
def _applied(linear: nn.Linear) -> Tensor:
    """The matrix that a layer with quantised weights multiplies by, however it stores it."""
    weight = linear.weight
    dtype = getattr(linear, "compute_dtype", None)  # of GGUF and bitsandbytes
    if dtype is None:
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
    units = torch.eye(linear.in_features, dtype=dtype, device=weight.device)
    return (linear(units) - linear(torch.zeros_like(units[:1]))).T
