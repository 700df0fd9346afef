"""Tokens sorted once a forward, by the tile that a plan's heads share, instead of in every layer.

Hooks of torch sort what enters a transformer by token, and put back what leaves it. In between all work is on
tokens one by one, but for attention, which is told how they lie. No forward is copied.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Tile, TokenLayout, tile_order
from ..on_cpu import on_cpu
from ..patterns.pattern import tile_text
from .families import FAMILIES, family_of
from .families.family import Arguments, signature_of
from .families.way import Axis, Point, Way
from .step_caches import reset_step_cache
from .traced import handle_of, sort_traced

logger = logging.getLogger("sparse_dit")

MAX_LAYOUTS = 8


class TokenOrder:
    """Sorts the tokens of a transformer in each forward, or says why it doesn't.

    Args:
        transformer: The transformer.
        tile: The tile by which tokens are sorted, or why there is none.
    """

    def __init__(self, transformer: nn.Module, tile: Tile | str) -> None:
        self._transformer: Any = transformer
        self._tile = tile
        family = family_of(transformer)
        assert family is not None, "no other class can be attached to"
        self._points = family.way.points(transformer) if isinstance(family.way, Way) else []
        self._now: _Orders | None = None  # None in forwards that aren't sorted
        self._missing: set[Point] = set()  # what the present forward hasn't passed yet
        self._orders: dict[TokenLayout, _Orders] = {}
        self._sorters: list[_Sorter] = []
        self._sorted = 0
        self._refused: Counter[str] = Counter()
        end = self._end_forward  # pyright: ignore[reportAttributeAccessIssue]
        self._end_hook = transformer.register_forward_hook(end, always_call=True)
        reset_step_cache(transformer)  # what it holds lies in the model's order

    @property
    def notes(self) -> tuple[str, ...]:
        """In how many forwards tokens were sorted, and in how many they weren't, and why."""
        times, found = self._sorted, []
        if times and not isinstance(self._tile, str):
            found.append(
                f"tokens sorted once a forward ({times}x), by tiles of {tile_text(self._tile)}"
            )
        for why, times in self._refused.items():
            found.append(f"tokens in the model's own order ({times}x): {why}")
        return tuple(found)

    def begin_forward(
        self, layout: TokenLayout | None, arguments: Arguments, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tile | None, tuple, dict[str, Any]]:
        """Decide for a forward that begins, and sort what of its arguments is by token.

        Args:
            layout: The host's sequence in self-attention; None if the arguments don't tell it.
            arguments: All of them by name.
            args, kwargs: The same as they came.

        Returns:
            The tile that tokens lie by in this forward, None for the model's own order; `args` and `kwargs`.
        """
        self._now = None
        found = self._decide(layout, arguments)
        if isinstance(found, str):
            if found not in self._refused:
                logger.warning("tokens stay in the model's own order: %s", found)
            self._refused[found] += 1
            return None, args, kwargs
        assert not isinstance(self._tile, str), "else it was refused"
        self._now, self._missing = found, {point for point in self._points if point.always}
        self._sorted += 1
        for sorter in self._sorters:
            if not sorter.point.module:
                args, kwargs = sorter.arguments(args, kwargs)
        return self._tile, args, kwargs

    def turned(self, point: Point, x: Tensor) -> Tensor:
        """A tensor that passes a point: sorted, or put back where tokens leave."""
        if self._now is None:
            return x
        self._missing.discard(point)
        return self._now.turned(x, point.axis, back=point.what is None)

    def detach(self) -> None:
        """Take the hooks off; twice is harmless."""
        self._end_hook.remove()
        for sorter in self._sorters:
            sorter.detach()
        self._sorters, self._now = [], None
        if self._sorted:
            reset_step_cache(self._transformer)

    def _decide(self, layout: TokenLayout | None, arguments: Arguments) -> _Orders | str:
        """The orders of a forward, or why it isn't sorted."""
        what, family = self._transformer, family_of(self._transformer)
        assert family is not None, "no other class can be attached to"
        if isinstance(self._tile, str):
            return self._tile
        if isinstance(family.way, str):
            return f"{type(what).__name__}: {family.way}"
        if type(what).__name__ not in FAMILIES:
            return f"{type(what).__name__} is a class of its own, whose forward may do more"
        if getattr(what, "_parallel_config", None) is not None:
            return "the model runs in parallel, and its tokens are cut as they come"
        if layout is None:
            return "the forward's arguments don't tell the token grid"
        if sum(segment.kind == "grid" for segment in layout.segments) != 1:
            return f"there must be one grid of tokens, got {layout}"
        if layout not in self._orders:
            if len(self._orders) == MAX_LAYOUTS:
                self._orders.clear()
            self._orders[layout] = _Orders(layout, self._tile)
        orders = self._orders[layout]
        if family.way.by_frames(what.config) and not orders.keeps_frames:
            return (
                "the model takes the first tokens for a frame, and tiles of "
                f"{tile_text(self._tile)} mix frames"
            )
        for point in self._points:
            if not point.module and not orders.fits(arguments.get(str(point.what)), point.axis):
                return f"the forward's {point.what} has other tokens than {layout}"
        self._hook()
        return orders

    def _hook(self) -> None:
        """Hook the modules that are there now; what is loaded later (a LoRA) may replace some."""
        module_of = self._transformer.get_submodule
        if self._sorters and all(s.module is module_of(s.point.module) for s in self._sorters):
            return
        for sorter in self._sorters:
            sorter.detach()
        self._sorters = [_Sorter(self, p, module_of(p.module)) for p in self._points]

    @torch.compiler.disable
    def _end_forward(self, transformer: nn.Module, args: tuple, output: Any) -> None:
        skipped, self._now = self._now and self._missing, None
        if output is not None and skipped:  # None: the forward raised
            raise RuntimeError(
                "a forward whose tokens are sorted must pass all places where they are, but left out "
                f"{sorted({point.module for point in skipped})}: is the forward another library's? Then "
                "patch with token_order='model'. Was it compiled whole before this patch? Then call "
                "torch._dynamo.reset()"
            )


class _Sorter:
    """One point of a transformer, at the module that is there. A copy has a handle of its own."""

    def __init__(self, owner: TokenOrder, point: Point, module: nn.Module) -> None:
        self.owner = owner
        self.point = point
        self.module = module
        self.handle = handle_of(self)
        self._position = _position(module, point.what) if isinstance(point.what, str) else 0
        self._hook: Any = None
        if not point.module:  # its own arguments are there before its hooks run
            return
        if isinstance(point.what, str):
            self._hook = module.register_forward_pre_hook(self._before, with_kwargs=True)
        else:
            self._hook = module.register_forward_hook(self._after)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, handle=handle_of(self))

    def detach(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A forward's arguments, with the point's one sorted."""
        name, place = str(self.point.what), self._position
        if name in kwargs:
            return args, {**kwargs, name: self._turned(kwargs[name])}
        if place < len(args):
            args = (*args[:place], self._turned(args[place]), *args[place + 1 :])
        return args, kwargs

    def sort(self, x: Tensor) -> Tensor:
        """What a compiled graph calls; see `traced`."""
        return self.owner.turned(self.point, x)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.arguments(args, kwargs)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        number = self.point.what
        if number is None:
            return self._turned(output)
        return tuple(self._turned(x) if n == number else x for n, x in enumerate(output))

    def _turned(self, x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [self._turned(part) for part in x]
        if x is None:
            return x
        return sort_traced(self.handle, x) if torch.compiler.is_compiling() else self.sort(x)


class _Orders:
    """The orders of a layout's tokens, for sequences of all of them, or of the grid with or without what
    comes after it.
    """

    @on_cpu
    def __init__(self, layout: TokenLayout, tile: Tile) -> None:
        whole = tile_order(layout, tile)
        first, size = whole.global_before, layout.num_grid
        grid = whole.order[first : first + size] - first
        _, height, width = layout.grid
        self.keeps_frames = bool((grid // (height * width)).diff().ge(0).all())
        self._orders: dict[int, Tensor] = {}
        for length, start in ((size, 0), (layout.seq_len - first, 0), (layout.seq_len, first)):
            order = torch.arange(length)
            order[start : start + size] = grid + start
            self._orders[length] = order
        self._moved: dict[tuple[int, bool, torch.device], Tensor] = {}

    def fits(self, x: Any, axis: Axis) -> bool:
        """Whether a tensor is by token, or for all tokens alike; or each of a sequence of them, or None."""
        if isinstance(x, list | tuple):
            return all(self.fits(part, axis) for part in x)
        if not isinstance(x, Tensor):
            return True
        if x.ndim < axis.ndim:
            return self._orders.keys().isdisjoint(x.shape)
        return x.ndim == axis.ndim and x.shape[axis.dim] in self._orders

    def turned(self, x: Tensor, axis: Axis, back: bool) -> Tensor:
        """A tensor with its tokens sorted, or put back.

        Raises:
            RuntimeError: If it has other tokens than the layout.
        """
        if not self.fits(x, axis):
            raise RuntimeError(
                f"a tensor of {sorted(self._orders)} tokens must pass here, got {tuple(x.shape)}; "
                "patch with token_order='model'"
            )
        if x.ndim < axis.ndim:
            return x
        length = x.shape[axis.dim]
        key = (length, back, x.device)
        if key not in self._moved:
            order = self._orders[length]
            self._moved[key] = (order.argsort() if back else order).to(x.device)
        return x.index_select(axis.dim, self._moved[key])


def _position(module: nn.Module, name: str) -> int:
    """The place of an argument of a module's forward, without `self`."""
    kind = type(getattr(module, "_orig_mod", module))  # within torch.compile's wrapper
    return list(signature_of(kind).parameters).index(name) - 1
