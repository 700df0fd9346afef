"""The attention functions that are registered with transformers, one for each of its own that is replaced.

A model's config names the function that its attention layers call. Layers with a `Seam` hand the call to what
is attached to them, all others get what they would get anyway: so one name serves every model of the process.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...call import AttentionCall, Intercept, StepContext
from ...intervals import RowIntervals, causal_items
from ...layout import TokenLayout
from ...modalities import Modalities
from ..traced import attend_traced, handle_of
from .canvases import Canvases, sees_both_ways
from .masks import intervals_of
from .media import COMPILED, Media

# stock implementation -> our name for it; hosts take a name with "flash" in it for another kind
NAMES = {"sdpa": "sparse_dit", "eager": "sparse_dit_eager"}
SEAM = "_sparse_dit_seam"  # the attribute of an attention module

# What changes the output and isn't in q, k, v, the mask, the scale or the sinks, with the value that changes
# nothing: only the stock function computes the others.
CHANGES: dict[str, Any] = {
    "dropout": 0.0,
    "softcap": None,
    "position_bias": None,
    "cache": None,
    "cu_seq_lens_q": None,
    "cu_seq_lens_k": None,
    "head_mask": None,
    "output_attentions": False,
}
# tensors among the arguments that say where tokens stand, which the mask says too
HARMLESS = {"position_ids", "cache_position", "token_type_ids", "mm_token_type_ids"}
UNKNOWN = StepContext(None, 1.0)  # of a compiled canvas, or one that came as inputs_embeds
MASKS = 8  # readings kept of one forward: full and sliding layers have one each


@dataclass(slots=True)
class Tap:
    """What the layers of one attached model share.

    Args:
        intercept: Gets every self-attention call; None once detached: layers run stock.
        decode: Of an intercept that leaves all calls of one query to stock attention, and counts them: what
            is told of each, its layer, the number of its heads and of its keys. None for others.
        context: Where the last forward stood.
        read: What the masks of the present forward say, by the mask's id and version, with a reference that
            tells whether the mask is still that one.
        media: What tells where a VLM's images and videos lie; None for other models.
        places: Where calls of the present forward stand, by their numbers of queries and keys.
        canvases: What tells where a forward of a diffusion language model stands; None for other models.
    """

    intercept: Intercept | None
    context: StepContext = field(default_factory=StepContext)
    media: Media | None = None
    read: dict[tuple, tuple[weakref.ref[Tensor], RowIntervals | str | None]] = field(
        default_factory=dict
    )
    places: dict[tuple[int, int, int], StepContext] = field(default_factory=dict)
    canvases: Canvases | None = None
    decode: Callable[[str, int, int], None] | None = field(init=False)

    def __post_init__(self) -> None:
        self.decode = getattr(self.intercept, "decode", None)

    def begin(self) -> None:
        """Forget what held for the forward before."""
        self.read.clear()
        self.places.clear()

    def stand(self, batch: int, n: int, m: int, sliding: bool, traced: bool) -> StepContext:
        """Where a call of n queries and m keys stands; of a sliding layer these are the last ones alone."""
        if self.media is None or (sliding and m > n):
            return _context(n, m)
        if traced:
            return replace(_context(n, m), modalities=(Modalities(m, unknown=COMPILED),) * batch)
        key = (batch, n, m)
        if key not in self.places:
            found = self.media.modalities(m, batch)
            self.places[key] = replace(_context(n, m), modalities=found)
        return self.places[key]

    def read_mask(self, mask: Tensor, num_queries: int, num_keys: int) -> RowIntervals | str | None:
        """See `intervals_of`; read once a forward, not a layer."""
        version = 0 if mask.is_inference() else mask._version
        key = (id(mask), version, num_queries, num_keys)
        found = self.read.get(key)
        if found is None or found[0]() is not mask:
            if len(self.read) >= MASKS:
                self.read.clear()
            found = (weakref.ref(mask), intervals_of(mask, num_queries, num_keys))
            self.read[key] = found
        return found[1]

    def __reduce__(self):
        return functools.partial(Tap, canvases=self.canvases), (
            self.intercept,
            self.context,
            self.media,
        )


class Seam:
    """One attention module's entry to the tap. Compiled code knows it by its `handle`; a copy has its own.

    Args:
        layer: Module path of the layer in its model.
        tap: What the model's layers share.
        module: The attention module.
        stock: Name of the stock implementation in whose place this runs.
    """

    def __init__(self, layer: str, tap: Tap, module: nn.Module, stock: str) -> None:
        self.layer = layer
        self.tap = tap
        self.module = module
        self.stock = stock
        self.function = _stock_function(stock, module)
        self.both_ways = tap.canvases is not None and sees_both_ways(module)
        self.handle = handle_of(self)

    def __reduce__(self):
        return Seam, (self.layer, self.tap, self.module, self.stock)

    def attend(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """What the operator in a compiled graph computes, `[B, H, N, D]`; see `integrations.traced`."""
        q, k, v = args
        given = {"dropout": kwargs["dropout_p"], "scaling": kwargs["scale"]}
        given["is_causal"] = kwargs["is_causal"]
        out, _ = self.call(q, k, v, kwargs["attn_mask"], given, traced=True)
        return out.transpose(1, 2)

    def call(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        given: dict[str, Any],
        traced: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one call, `[B, N, H, D]`, and what stock returned beside it.

        Args:
            q, k, v: `[B, H, N, D]`, `[B, num_kv_heads, M, D]` twice.
            mask: What the mask function made.
            given: The other arguments of the host.
            traced: Whether the model is compiled, so that no hook has run.
        """
        beside: list[Tensor | None] = [None]

        def stock() -> Tensor:
            out, beside[0] = self.function(self.module, q, k, v, mask, **given)
            return out

        if self.tap.intercept is None:
            return stock(), beside[0]
        unsupported = _unsupported(given, (q, k, v))
        rows = None
        if unsupported is None:
            found = self._rows(mask, given, q, k.shape[2])
            rows, unsupported = (None, found) if isinstance(found, str) else (found, None)
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        if rows is not None:  # a static cache is empty behind the queries
            filled = q.shape[2] if mask is None else _filled(rows, q.shape[2], k.shape[2])
            k_, v_ = k_[:, :filled], v_[:, :filled]
        sliding = given.get("sliding_window") is not None
        context = self._stand(q.shape[0], q.shape[2], k_.shape[1], sliding, traced)
        self.tap.context = context
        call = AttentionCall(
            self.layer, q_, k_, v_, mask, None, given.get("scaling"), context, unsupported, stock,
            rows=rows, sinks=given.get("s_aux"),
        )  # fmt: skip
        out = self.tap.intercept(call)
        return out, beside[0]

    def _stand(self, batch: int, n: int, m: int, sliding: bool, traced: bool) -> StepContext:
        if self.both_ways and self.tap.canvases is not None:
            known = None if traced else self.tap.canvases.stand(n, m)
            return UNKNOWN if known is None else known
        return self.tap.stand(batch, n, m, sliding, traced)

    def _rows(
        self, mask: Tensor | None, given: dict[str, Any], q: Tensor, num_keys: int
    ) -> RowIntervals | str | None:
        """The keys that each row sees, by the stock function's own rules; why they aren't intervals."""
        batch, num_queries = q.shape[0], q.shape[2]
        if mask is None:  # then causal order counts from the first key
            if not causal(self.stock, self.module, given, num_queries):
                return None
            return causal_items(batch, num_queries)
        found = self.tap.read_mask(mask, num_queries, num_keys)
        if not isinstance(found, RowIntervals) or found.start is None or found.stop is None:
            return found
        if found.start.shape[0] == batch:
            return found
        key = ("items", batch)
        if key not in found.cache:
            both = (x.expand(batch, -1) for x in (found.start, found.stop))
            found.cache[key] = RowIntervals(*both)
        items = found.cache[key]
        assert isinstance(items, RowIntervals)
        return items


def _filled(rows: RowIntervals, num_queries: int, num_keys: int) -> int:
    """Up to where some row sees keys, where there are more keys than rows; told once a forward."""
    if not 1 < num_queries < num_keys:
        return num_keys
    key = ("filled", num_queries, num_keys)
    if key not in rows.cache:
        last = int(rows.valid(num_keys, num_queries)[:, 1].max())
        rows.cache[key] = max(last, num_queries)
    found = rows.cache[key]
    assert isinstance(found, int)
    return found


@functools.lru_cache(maxsize=256)
def _context(n: int, m: int) -> StepContext:
    """Where a call of n queries and m keys stands: the last n of a plain sequence."""
    return StepContext(TokenLayout.sequence(m), 1.0, phase="decode" if n == 1 else "prefill")


def causal(stock: str, module: nn.Module, given: dict[str, Any], num_queries: int) -> bool:
    """Whether the stock function masks what comes later, where it is given no mask."""
    if stock == "eager":  # it does what the mask says alone
        return False
    said = given.get("is_causal")
    return num_queries > 1 and bool(getattr(module, "is_causal", True) if said is None else said)


def register() -> None:
    """Make our names known to transformers; twice is harmless."""
    for stock, name in NAMES.items():
        AttentionInterface.register(name, _function(stock))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])


@functools.cache
def _function(stock: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    # hosts name these five, and some pass the mask by its name
    def attention(module, query, key, value, attention_mask=None, **given):
        seam = module.__dict__.get(SEAM)
        if seam is None:
            function = _stock_function(stock, module)
            return function(module, query, key, value, attention_mask, **given)
        if not torch.compiler.is_compiling():
            shape = query.shape
            if shape[2] == 1 and (decode := seam.tap.decode) is not None:
                decode(seam.layer, shape[0] * shape[1], key.shape[2])
                return seam.function(module, query, key, value, attention_mask, **given)
            return seam.call(query, key, value, attention_mask, given)
        if not _traceable(given):
            return untraced(seam, query, key, value, attention_mask, given)
        options = {
            "attn_mask": attention_mask,
            "dropout_p": given.get("dropout") or 0.0,
            "is_causal": causal(stock, module, given, query.shape[2]),
            "scale": given.get("scaling"),
        }
        out = attend_traced(seam.handle, query, key, value, options, heads_first=True)
        return out.transpose(1, 2), None

    attention.__name__ = NAMES[stock]
    return attention


def _untraced(seam: Seam, *args: Any) -> tuple[Tensor, Tensor | None]:
    return seam.call(*args, traced=True)


# a compiled model breaks its graph here, if the host asks for what the operator can't hand on
untraced: Any = torch.compiler.disable(_untraced)


def _traceable(given: dict[str, Any]) -> bool:
    known = given.get("s_aux") is None
    return known and all(_same(given.get(n, same), same) for n, same in CHANGES.items())


def _stock_function(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the unpatched layer would call."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _unsupported(given: dict[str, Any], tensors: tuple[Tensor, ...]) -> str | None:
    """What only the stock function computes, in words."""
    for name, value in given.items():
        if name in CHANGES and not _same(value, CHANGES[name]):
            shown = f" ({value})" if isinstance(value, int | float) else ""
            return f"{name}{shown}"
        unknown = isinstance(value, Tensor) and name not in HARMLESS and name != "s_aux"
        if unknown and name not in CHANGES:
            return f"the argument {name}, which sparse_dit doesn't know"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "gradients"
    return None


def _same(value: Any, same: Any) -> bool:
    return value is None or (not isinstance(value, Tensor) and value == same)
