"""Where the tokens of a transformer's grid enter, so that they can be sorted there, and where they leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

# arguments of diffusers' `_cp_plan` that are of the text: its tokens stay where they are
TEXT = {
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "txt_ids",
}


class Axis(NamedTuple):
    """Which dimension of a tensor counts tokens.

    Args:
        dim: The dimension.
        ndim: How many the tensor has then; one with fewer is for all tokens alike.
    """

    dim: int
    ndim: int


@dataclass(frozen=True)
class Point:
    """A tensor, or a sequence of them, that is put into another order.

    Args:
        module: Module path from the transformer, `""` for itself.
        what: The name of an argument of its forward, or the number of an output; None for its whole output,
            where tokens leave: it is put back.
        axis: The axis of each tensor that counts tokens.
        always: Whether every forward passes it.
    """

    module: str
    what: str | int | None
    axis: Axis
    always: bool = True


@dataclass(frozen=True)
class Way:
    """What of a transformer's forward is by token: enough to sort them at its start and back at its end.

    diffusers names most of it, as its context parallelism splits there: `_cp_plan`.

    Args:
        more: What isn't in `_cp_plan`: by module path, the names of arguments or numbers of outputs.
        back: Modules, not in `_cp_plan`, whose output is put back.
        without: What of `_cp_plan`, by module path and name or number, is of the text.
        by_frames: Function of config -> whether layers take the first frame's tokens for the first ones, so
            that frames have to stay one after another.
    """

    more: Mapping[str, Mapping[str | int, Axis]] = field(default_factory=dict)
    back: Mapping[str, Axis] = field(default_factory=dict)
    without: Collection[tuple[str, str | int]] = ()
    by_frames: Callable[[Any], bool] = lambda config: False

    def points(self, transformer: nn.Module) -> list[Point]:
        """All of a transformer's, those of `_cp_plan` first."""
        found = [*self._parallel(transformer)]
        for module, parts in self.more.items():
            found += [
                Point(module, what, axis, always=bool(module)) for what, axis in parts.items()
            ]
        return found + [Point(module, None, axis) for module, axis in self.back.items()]

    def _parallel(self, transformer: nn.Module) -> Iterator[Point]:
        plan: Mapping[str, Any] = getattr(type(transformer), "_cp_plan", None) or {}
        for module, parts in plan.items():
            if not isinstance(parts, Mapping):
                yield Point(module, None, Axis(parts.gather_dim, parts.expected_dims))
                continue
            for what, part in parts.items():
                if what in TEXT or (module, what) in self.without:
                    continue
                axis, always = Axis(part.split_dim, part.expected_dims), "*" not in module
                for path in _paths(transformer, module):
                    yield Point(path, what, axis, always=always and bool(module))


def _paths(transformer: nn.Module, module: str) -> list[str]:
    """A path, or those of all members of the list that it ends with `.*` of."""
    holder, star, _ = module.partition(".*")
    if not star:
        return [module]
    return [f"{holder}.{name}" for name, _ in transformer.get_submodule(holder).named_children()]
