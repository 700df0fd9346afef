"""A node for ComfyUI that makes a model's attention follow a plan.

A folder in `custom_nodes` with one line is the node pack:
`from sparse_dit.hosts.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..call import Branch
from ..plan import ComponentPlan, Plan
from ..step_cache import StepCache
from .planned import Forward, PlannedAttention, Unknown

HOST = "ComfyUI"
OVERRIDE = "optimized_attention_override"
KEY = "sparse_dit"  # of the callbacks
# what attention may be asked for beside tensors: others may change what is computed
KNOWN = {"transformer_options", "_inside_attn_wrapper", "low_precision_attention", "scale"}


class FollowPlan:
    """The node: a model in, the same model with sparse attention out."""

    CATEGORY = "model/patch"
    FUNCTION = "follow"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = (
        "Computes attention as a sparse_dit plan says; where it can't, the model's own runs."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node takes, in ComfyUI's form."""
        return {
            "required": {
                "model": ("MODEL",),
                "plan": ("STRING", {"tooltip": "A plan's file, built-in name or hub id."}),
            },
            "optional": {
                "component": (
                    "STRING",
                    {"default": "", "tooltip": "Which of a plan's transformers."},
                )
            },
        }

    def follow(self, model: Any, plan: str, component: str = "") -> tuple[Any]:
        """A clone of the model that follows the plan.

        Raises:
            PlanError: If there is no such plan.
            ValueError: If it has several components and none of them is named.
        """
        from comfy.patcher_extension import (  # pyright: ignore[reportMissingImports]
            CallbacksMP,
        )

        loaded = Plan.from_pretrained(plan)
        part = component or (next(iter(loaded.components)) if len(loaded.components) == 1 else "")
        if part not in loaded.components:
            raise ValueError(
                f"component must be one of {sorted(loaded.components)}, got {component!r}"
            )
        override, cloned = Override(loaded, part), model.clone()
        override.install(cloned.model_options.setdefault("transformer_options", {}))
        # each step, as a node that comes later may have put its own in the place
        cloned.add_callback_with_key(
            CallbacksMP.ON_PREPARE_STATE,
            KEY,
            lambda patcher, timestep, options: override.install(options["transformer_options"]),
        )
        cloned.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, lambda patcher: override.forget())
        return (cloned,)


class Override:
    """What takes ComfyUI's attention calls, in front of whatever took them before."""

    def __init__(self, plan: Plan, component: str) -> None:
        self.planned = PlannedAttention(plan, HOST, _setting)
        self.planned.leave_cache()
        self.component = component
        self._layers = _numbered(plan.components[component])
        self._installed: list[Callable[..., Tensor]] = []
        self._sigma: tuple[Any, float] = (None, 0.0)
        self._schedule: tuple[Any, list[float]] = (None, [])
        self._block: tuple[Any, Any] = (None, None)

    def install(self, options: dict[str, Any]) -> None:
        """Put it in front of what takes the calls now; once it is there, nothing changes."""
        previous = options.get(OVERRIDE)
        if previous not in self._installed:
            self._installed.append(functools.partial(self.attend, previous))
            options[OVERRIDE] = self._installed[-1]

    def forget(self) -> None:
        """Drop what is kept of a run: outputs for later steps, and tensors that were read."""
        self.planned.forget()
        self._sigma, self._schedule, self._block = (None, 0.0), (None, []), (None, None)

    def attend(
        self,
        previous: Callable[..., Tensor] | None,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **more: Any,
    ) -> Tensor:
        """Attention in ComfyUI's form: `[B, N, H * D]`, or `[B, H, N, D]` with `skip_reshape`."""

        def dense() -> Tensor:
            run = func if previous is None else functools.partial(previous, func)
            return run(
                q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape, **more,
            )  # fmt: skip

        axis = 2 if skip_reshape else 1
        if q.shape[axis] != k.shape[axis]:
            return dense()  # cross-attention
        options = more.get("transformer_options") or {}
        try:
            layer = self._layer(options)
            if layer is None:
                return dense()
            self._check(options, q, k, v, mask, more)
        except Unknown as unknown:
            self.planned.decline(str(unknown))
            return dense()
        qkv = tuple(
            x.transpose(1, 2) if skip_reshape else x.unflatten(2, (heads, -1)) for x in (q, k, v)
        )
        scale = more.get("scale")

        def own() -> Tensor:
            out = dense()
            return out.transpose(1, 2) if skip_output_reshape else out.unflatten(2, (heads, -1))

        attend = self.planned.attend  # pyright: ignore[reportAttributeAccessIssue]
        out = attend(
            self.component,
            layer,
            (qkv[0], qkv[1], qkv[2]),
            qkv[0].shape[3] ** -0.5 if scale is None else scale,
            lambda: self._forward(options),
            lambda: (0, 1),
            own,
        )
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)

    def _layer(self, options: Mapping[str, Any]) -> str | None:
        """The plan's layer of the block that runs; None if the plan leaves it to the model."""
        number = options.get("block_index")
        if number is None:
            raise Unknown("this model doesn't say which of its blocks runs (block_index)")
        return self._layers.get((options.get("block_type") == "single", int(number)))

    def _check(
        self,
        options: Mapping[str, Any],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        more: Mapping[str, Any],
    ) -> None:
        """Raise Unknown unless the call is plain attention, and its block's first over as many tokens."""
        place = (options, options["block_index"])
        again = self._block[0] is options and self._block[1] == place[1]
        self._block = place
        if again:
            raise Unknown("a second attention over the video's tokens in one block")
        if mask is not None:
            raise Unknown("attention with a mask")
        if not q.shape == k.shape == v.shape:
            raise Unknown("keys or values with fewer heads, or of another width")
        if other := sorted(name for name in more.keys() - KNOWN if more[name] is not None):
            raise Unknown(f"attention is asked for with {', '.join(other)}")

    def _forward(self, options: Mapping[str, Any]) -> Forward:
        """Where the forward stands; noise levels are read back once a step, the schedule once a run."""
        grid, sigmas = options.get("grid_sizes"), options.get("sigmas")
        schedule = options.get("sample_sigmas")
        if grid is None or len(grid) != 3:
            raise Unknown("this model doesn't publish its grid of tokens (grid_sizes)")
        if sigmas is None or schedule is None:
            raise Unknown("the sampler doesn't tell noise levels (sigmas, sample_sigmas)")
        if self._sigma[0] is not sigmas:
            self._sigma = sigmas, float(sigmas.max())
        if self._schedule[0] is not schedule:
            self._schedule = schedule, schedule.flatten().tolist()
        sigma, levels = self._sigma[1], self._schedule[1]
        frames, rows, columns = (int(n) for n in grid)
        return Forward(
            generation=schedule,
            step=min(range(len(levels)), key=lambda n: math.fabs(levels[n] - sigma)),
            sigma=sigma,
            branch=_branch(options.get("cond_or_uncond")),
            grid=(frames, rows, columns),
        )


def _setting(cache: StepCache) -> str:
    return "the node EasyCache, behind this one or before it"


def _branch(found: Any) -> Branch:
    """ComfyUI marks each part of a batch: 0 for the prompt's, 1 for the other."""
    kinds = set(found or ())
    return "cond" if kinds == {0} else "uncond" if kinds == {1} else "any"


def _numbered(part: ComponentPlan) -> dict[tuple[bool, int], str]:
    """The plan's layers by whether their block is a single-stream one, and its number."""
    found = {}
    for layer in part.layers:
        if match := re.fullmatch(r"(single_)?(?:transformer_)?blocks\.(\d+)\.attn1?", layer):
            found[match[1] is not None, int(match[2])] = layer
    return found


NODE_CLASS_MAPPINGS = {"SparseDitFollowPlan": FollowPlan}
NODE_DISPLAY_NAME_MAPPINGS = {"SparseDitFollowPlan": "Sparse Attention by Plan"}
