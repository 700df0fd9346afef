"""Token orders in which one layout describes all items of a batch, and what a mask says of them."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Segment, TokenLayout


@dataclass(frozen=True, eq=False)
class Arrangement:
    """What a forward's arguments say of its tokens where the layers have a mask.

    Layers build the mask themselves, each anew, so it isn't read back from every one of them.

    Args:
        layout: The sequence as `arrange` puts it.
        order: int64 `[B, N]`, for each token of `layout` its place in the host's sequence; None if
            the host's order is the layout's.
        kv_len: int64 `[B]`, keys of `layout` from here on are padding; None if there is none.
        bias: float `[B, N]`, whose outer product an item's mask adds to the logits; None if it
            adds nothing.
        only_keys: How many of the host's tokens, first and last ones, are keys that are no queries.
            Queries of zeros stand for them, whose outputs are dropped: rows that are computed in vain.
    """

    layout: TokenLayout
    order: Tensor | None = None
    kv_len: Tensor | None = None
    bias: Tensor | None = None
    only_keys: tuple[int, int] = (0, 0)

    def widens(self, q: Tensor, k: Tensor) -> bool:
        """Whether a layer's queries `[B, N, H, D]` lack just the tokens that are keys alone."""
        missing = sum(self.only_keys)
        return missing > 0 and q.shape[1] + missing == k.shape[1] == self.layout.seq_len

    def fits(self, x: Tensor) -> bool:
        """Whether a layer's tokens `[B, N, H, D]` are those of the forward."""
        if any(self.only_keys) and x.shape[1] + sum(self.only_keys) != self.layout.seq_len:
            return False
        known = [y.shape for y in (self.order, self.bias) if y is not None]
        return all(shape == (len(x), x.shape[1] + sum(self.only_keys)) for shape in known)

    def arrange(self, x: Tensor) -> Tensor:
        """The host's tokens `[B, N, H, D]` in the layout's order."""
        return x if self.order is None else _take(x, self.order)

    def arrange_queries(self, x: Tensor) -> Tensor:
        """The same of a layer's queries, or of its output, which may lack tokens that are keys alone."""
        if any(self.only_keys):
            x = F.pad(x, (0, 0, 0, 0, *self.only_keys))
        return self.arrange(x)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `arrange_queries`."""
        x = x if self._back is None else _take(x, self._back)
        first, last = self.only_keys
        return x[:, first : x.shape[1] - last] if first or last else x

    @functools.cached_property
    def _back(self) -> Tensor | None:
        return None if self.order is None else self.order.argsort(1)


_NEW = itertools.count(-1, -1)


def version_of(x: Tensor) -> int:
    """A number that changes when a tensor is written to; another each time if torch doesn't tell."""
    return next(_NEW) if x.is_inference() else x._version


def image_first(valid: Tensor, start: Tensor | int, grid: TokenLayout) -> Arrangement:
    """Each item's image tokens first, then its valid other tokens, then its padding.

    Args:
        valid: bool `[B, N]`, keys that the host's mask lets be seen; all of the image is.
        start: Place of the first image token, int64 `[B]` where the items differ.
        grid: Layout of the image alone.
    """
    place = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    first = torch.as_tensor(start, device=valid.device).reshape(-1, 1)
    image = (place >= first) & (place < first + grid.seq_len)
    rank = torch.where(image, 0, torch.where(valid, 1, 2))
    others = Segment.global_(valid.shape[1] - grid.seq_len)
    return Arrangement(
        TokenLayout((*grid.segments, others)),
        rank.argsort(dim=1, stable=True),
        (image | valid).sum(1),
    )


@functools.lru_cache(maxsize=4)
def padding_last(mask: Tensor, _version: int, layout: TokenLayout) -> Arrangement:
    """Where text comes first and some of it is padding: the image first, then the rest, padding last.

    Cached by the mask's identity and version: a pipeline passes one tensor to all steps.

    Args:
        mask: `[B, text]` or any shape of `[B, N]`, true or not 0 where a token is valid.
        layout: Text, image, and other tokens that are all valid.
    """
    text, image = layout.segments[:2]
    valid = mask.reshape(len(mask), -1)[:, : text.length].bool()
    others = valid.new_ones(len(mask), layout.seq_len - text.length)
    return image_first(torch.cat([valid, others], 1), text.length, TokenLayout((image,)))


@functools.lru_cache(maxsize=4)
def text_bias(mask: Tensor, _version: int, layout: TokenLayout) -> Arrangement:
    """For layers that add 1 to a logit where a text mask `[B, text]` allows both tokens; see above."""
    bias = mask.new_ones(len(mask), layout.seq_len, dtype=torch.float32)
    bias[:, : mask.shape[1]] = mask > 0
    return Arrangement(layout, bias=None if (bias == 1).all() else bias)


def _take(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))
