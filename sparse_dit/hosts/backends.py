"""Attention backends of servers whose layers follow a plan: what SGLang's and vLLM-Omni's have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .planned import Forward, PlannedAttention, Shard, Unknown

OTHER = ("causal", "is_cross_attention", "dropout_p")  # attention that no plan is for


def following(
    backend: Any,
    planned: PlannedAttention,
    named: Callable[[str], tuple[str | None, str]],
    forward: Callable[[Any, int], Forward],
    shard: Shard,
) -> Any:
    """A subclass of a server's backend whose layers follow the plan; all else stays the backend's own.

    Args:
        backend: A class with `get_impl_cls`.
        planned: The plan.
        named: Of a layer that is made with this prefix, the pipeline's name of its transformer (None if
            the server doesn't tell) and its module path in diffusers.
        forward: Says where a forward stands, by the layer's metadata and the number of queries.
        shard: See `PlannedAttention.attend`.
    """
    base = backend.get_impl_cls()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        name, self._planned_layer = named(str(kwargs.get("prefix", "")))
        self._planned_scale = kwargs.get("softmax_scale")
        self._planned_layout = kwargs.get("qkv_layout")
        self._planned_known = planned.knows(name)
        self._planned_component = planned.component(name, self._planned_layer)
        self._follows = (
            self._planned_component is not None
            and self._planned_scale is not None
            and not any(kwargs.get(key) for key in OTHER)
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None, **more: Any
    ) -> Any:
        def stock() -> Any:
            return base.forward(self, query, key, value, attn_metadata, **more)

        if not self._follows:
            if self._planned_known:
                planned.unmatched(self._planned_layer)
            return stock()
        if more:
            planned.decline(f"it asks for {', '.join(sorted(more))}")
            return stock()
        if self._planned_layout not in (None, "BSND"):
            planned.decline(f"queries lie as {self._planned_layout}, not as BSND")
            return stock()
        return planned.attend(  # pyright: ignore[reportAttributeAccessIssue]
            self._planned_component,
            self._planned_layer,
            (query, key, value),
            self._planned_scale,
            lambda: forward(attn_metadata, query.shape[1]),
            shard,
            stock,
        )

    def forward_into(self, *args: Any, **kwargs: Any) -> bool:
        # by this way in, SGLang would pass the forward by
        return not self._follows and base.forward_into(self, *args, **kwargs)

    methods: dict[str, Any] = {"__init__": __init__, "forward": attend}
    if hasattr(base, "forward_into"):
        methods["forward_into"] = forward_into
    impl = type(f"Planned{base.__name__}", (base,), methods)
    own = {"get_impl_cls": staticmethod(lambda: impl)}
    return type(f"Planned{backend.__name__}", (backend,), own)


def share(tensor: tuple[int, int], ulysses: tuple[int, int], ring: int) -> tuple[int, int]:
    """The number of this process among those that the heads are divided among, and how many there are.

    Args:
        tensor: Number and count of tensor parallelism, which divides the heads.
        ulysses: The same of Ulysses', which divides each part of them.
        ring: How many processes have a part of the keys.

    Raises:
        Unknown: If the keys are divided.
    """
    if ring > 1:
        raise Unknown("ring attention, in which each process has a part of the keys")
    return tensor[0] * ulysses[1] + ulysses[0], tensor[1] * ulysses[1]
