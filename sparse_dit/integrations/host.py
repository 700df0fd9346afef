"""What the package asks of a library whose models it patches and searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from ..call import Intercept, StepContext
from ..generation import Case, GenerationSettings
from ..layout import Tile, TokenLayout
from ..step_cache import StepCache
from ..timing import Taken


class Attachment(Protocol):
    """What is attached to one component, until it is detached.

    Attributes:
        context: Where the last forward stood.
        intercept: What gets the calls; None once detached.
        lost: Layers that were replaced while attached, which run stock attention.
        replaced: Whether the pipeline had another module in the component's place while attached.
    """

    @property
    def context(self) -> StepContext: ...
    @property
    def intercept(self) -> Intercept | None: ...
    @property
    def lost(self) -> list[str]: ...
    @property
    def replaced(self) -> bool: ...

    def begin_run(self) -> None:
        """Let the next forward begin a generation; see `Handle.begin_run`."""
        ...

    def detach(self) -> None:
        """Restore the very stock objects; twice is harmless."""
        ...


@runtime_checkable
class Caching(Protocol):
    """An attachment to a component of a library that has step caches."""

    def enable_step_cache(self, cache: StepCache) -> None:
        """Enable a step cache until detached; one that is enabled already stays.

        Raises:
            ValueError: If the component doesn't take it.
        """
        ...

    @property
    def step_cache(self) -> StepCache | str | None:
        """What is enabled, by whomever: of one that isn't known its name; None for none."""
        ...

    @property
    def steps(self) -> int | None:
        """Steps of the generation that the model is in, or was in last; None if that isn't known."""
        ...


@runtime_checkable
class Sorting(Protocol):
    """An attachment to a component whose tokens can be sorted before its first layer."""

    def sort_tokens(self, tile: Tile | str) -> None:
        """Sort tokens once a forward by a tile until detached, where that can be done.

        `StepContext.sorted_by` says of each forward whether it was.

        Args:
            tile: The tile; or why there is none, which `token_order` then tells.
        """
        ...

    @property
    def token_order(self) -> tuple[str, ...]:
        """In which forwards tokens were sorted, and in which not, and why; nothing if it wasn't asked for."""
        ...


class Workload(Protocol):
    """What a model is run for: any case, at one size and in one way.

    Attributes:
        model: The pipeline or model.
        settings: The size and the way; two workloads of a model with equal settings are equal.
        device: Where it computes.
        loss: The metric of `difference` in which errors of attention add up, the larger the worse: the mean
            squared change of pixels, or the divergence of distributions.
        quality: The metric by which people judge; plans note it. It may be the same.
        has_larger: Whether there may be greater distances between tokens than at this size; see `larger`.
    """

    loss: ClassVar[str]
    quality: ClassVar[str]

    @property
    def model(self) -> Any: ...
    @property
    def settings(self) -> GenerationSettings: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def has_larger(self) -> bool: ...

    def check(self, case: Case) -> None:
        """Raise ValueError, before anything is run, if the model can't do this; it needs no weights here."""
        ...

    def run(
        self, case: Case, after_step: Callable[[torch.Tensor], bool | None] | None = None
    ) -> tuple[Any, Taken]:
        """Run a case once: the same case gives the same output.

        Args:
            case: What is run.
            after_step: Called after each step with what there is by then. If it returns True, the run ends
                there, and the output is None; the model is then as after a whole run.

        Returns:
            The output, an array of floats in a shape that `difference` knows, and how long it took.

        Raises:
            ValueError: See `check`.
        """
        ...

    def difference(self, output: Any, reference: Any) -> dict[str, float]:
        """How far an output is from the dense one of the same case, by metric: `loss`, `quality`.

        The loss of an output to itself is finite if the output is, and only then.
        """
        ...

    def plain(self) -> Workload:
        """The same without what computes everything twice (guidance), if that can be left out."""
        ...

    def with_steps(self, steps: int) -> Workload:
        """The same in another number of steps."""
        ...

    def reduced(self) -> Workload:
        """The same at a smaller size, where runs are cheap: to measure how sensitive the output is to errors.

        It is this one where a smaller one would tell nothing.
        """
        ...

    def larger(self) -> Workload | None:
        """One of about as many tokens with greater distances between them; None if the model makes none."""
        ...


@dataclass(frozen=True)
class Seen:
    """What is known of a generation before its first forward.

    Attributes:
        layouts: The token layout of each component, by name.
        image_only: For each component the layers that see the layout without its text.
        sigmas: Noise level of each step from the first on; None if it can't be told.
        steps: How many there are; None if that isn't known either.
        boundary: The noise level from which on upwards the first of two components runs; None if not known.
    """

    layouts: dict[str, TokenLayout]
    image_only: dict[str, set[str]] = field(default_factory=dict)
    sigmas: list[float] | None = None
    steps: int | None = None
    boundary: float | None = None


class Host(Protocol):
    """The functions of a host's module.

    The first five are all that `patch` needs; `sparse_dit.integrations` hands them on and explains them. The
    next two serve the search, `noise_level` rules without a plan and `steps_of` plans that are learned (a
    language model's host has neither), `denoising_layers`, `write`, `load_denoiser` and `outline_denoiser`
    diffusion language models, which other hosts lack, `probe` plans from geometry, `one_step` the report, the
    rest the command line.
    Components have `config` (a mapping that says what they were made from), `device` and `dtype`.
    """

    def components(self, model: Any, /) -> dict[str, nn.Module]: ...
    def self_attention_layers(self, module: nn.Module, /) -> dict[str, nn.Module]: ...
    def heads_of(self, module: nn.Module, /) -> dict[str, tuple[int, int]]: ...
    def attach(
        self, module: nn.Module, intercept: Intercept, pipe: Any = None, /
    ) -> Attachment: ...
    def attachment_of(self, module: nn.Module, /) -> Attachment | None: ...

    def denoising_layers(self, model: Any, /) -> list[str]:
        """The attention layers that a diffusion language model denoises text with; none of other models."""
        ...

    def write(self, pipe: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Taken]:
        """What a diffusion language model writes after a prompt, and how long it took."""
        ...

    def load_denoiser(self, name: str, dtype: torch.dtype, /) -> Any:
        """The pipeline of a diffusion language model, from a folder or hub id."""
        ...

    def outline_denoiser(self, name: str, dtype: torch.dtype, /) -> Any:
        """The same without weights."""
        ...

    def output_projection(self, layer: nn.Module, /) -> nn.Module | None:
        """What an attention layer multiplies its heads' outputs by; None if it has no such module."""
        ...

    def workload(self, model: Any, settings: GenerationSettings, /) -> Workload:
        """How the model is run at a size and in a way."""
        ...

    def noise_level(self, model: Any, share: float, /) -> float:
        """The noise level that a generation reaches after a share of its steps, by the model's schedule."""
        ...

    def steps_of(self, model: Any, /) -> int | None:
        """Steps of the generation that a model is in, or was in last; None if that isn't known."""
        ...

    def probe(
        self, model: Any, given: Mapping[str, Any], layout: TokenLayout | None = None, /
    ) -> Seen:
        """What a generation would be, at no forward's cost.

        Args:
            model: A pipeline; with `layout` a component will do.
            given: Arguments of the pipeline's call.
            layout: Where the tokens lie. The pipeline then isn't called.

        Raises:
            ValueError: If the pipeline needs other arguments, or they don't tell the layout.
        """
        ...

    def one_step(self, model: Any, /) -> Any:
        """The model's single predictions on given videos, as `teacher.OneStep` has them.

        Raises:
            NotImplementedError: If they can't be had of this model.
        """
        ...

    def outline(self, name: str, dtype: torch.dtype, /) -> Any | None:
        """The pipeline of a folder or hub id without its weights; None if only the loaded one can tell."""
        ...

    def load(self, name: str, dtype: torch.dtype, weights: bool = True, /) -> Any:
        """The pipeline of a folder or hub id; without `weights` its components can't compute."""
        ...

    def add_lora(self, pipe: Any, file: Path, /) -> None:
        """Add LoRA weights into a pipeline's own."""
        ...
