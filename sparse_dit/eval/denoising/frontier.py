"""Rules and plans for a diffusion language model: quality over measured time, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...environment import environment
from ...outputs import Outputs, check_writable
from ...patch import patch
from ...plan import Plan
from ...words import option
from ..rows import Row, keep_rows, kept_rows, model_told, plans_told, texts_told, weights_told
from .measure import Measure
from .prompts import Prompt, begun, hidden
from .ways import METHODS, of_plan
from .writing import Writing

FORMAT = "sparse_dit denoising frontier 1"
DEPTHS = (0.2, 0.8)


@dataclass(frozen=True, kw_only=True)
class DenoisingFrontier:
    """What to compare.

    Args:
        texts: Texts by name: each is gone on with, and a pass key is hidden in it.
        tokens: Tokens of a prompt.
        writing: How much is written.
        plans: Plans by name.
        methods: Some of `METHODS`, each with all of its numbers.
        depths: Where pass keys lie; none to ask for none.
        file: JSON of the rows; one that is there is gone on with.

    Raises:
        ValueError: If anything is out of range.
    """

    texts: Mapping[str, str]
    file: Path
    tokens: int = 1024
    writing: Writing = field(default_factory=Writing)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    methods: Sequence[str] = tuple(METHODS)
    depths: Sequence[float] = DEPTHS

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError(f"{option('text')} must name at least one text, got none")
        if unknown := set(self.methods) - set(METHODS):
            raise ValueError(
                f"{option('methods')} must be among {list(METHODS)}, got {sorted(unknown)}"
            )

    def prompts(self, pipe: Any) -> list[Prompt]:
        """Prompts of all texts.

        Raises:
            ValueError: If one is too short, or they don't fit into the model, or it has no mask token.
        """
        if pipe.mask_token_id is None:
            raise ValueError(
                f"what is compared are models with a mask token, and {type(pipe.model).__name__} has none"
            )
        self.writing.check(pipe, self.tokens)
        found = []
        for name, text in self.texts.items():
            found.append(begun(pipe.tokenizer, name, text, self.tokens))
            found += hidden(pipe.tokenizer, name, text, self.tokens, self.depths)
        return found

    def check(self, pipe: Any) -> None:
        """Raise unless prompts and plans suit a pipeline, which needs no weights, and rows can be added.

        Raises:
            ValueError: See `prompts` and `patch`; or the file holds other rows.
        """
        self.prompts(pipe)
        for plan in self.plans.values():
            with patch(pipe, plan):
                pass
        check_writable(self.file, "file")
        kept_rows(self.file, FORMAT, self.conditions(pipe))

    def conditions(self, pipe: Any) -> dict[str, Any]:
        """What rows of one file have in common."""
        return {
            "model": model_told(pipe),
            "weights": weights_told(pipe),
            "texts": texts_told(self.texts),
            "tokens": self.tokens,
            "depths": list(self.depths),
            **vars(self.writing),
            **({"plans": plans_told(self.plans)} if self.plans else {}),
        }


def frontier(
    pipe: Any, request: DenoisingFrontier, say: Callable[[str], None], outputs: Outputs
) -> list[Row]:
    """Measure plans and rules; rows are in the file as soon as they are measured.

    Each has method, source and number, and what `Measure.row` gives.

    Args:
        pipe: A `LLaDA2Pipeline`, not patched.
        request: What to compare.
        say: Called with a line of text before each step.
        outputs: Has checked the file; knows where it lies afterwards.
    """
    request.check(pipe)
    conditions = request.conditions(pipe)
    rows = kept_rows(request.file, FORMAT, conditions)
    prompts = request.prompts(pipe)
    todo: list[tuple[str, float | None]] = [(name, None) for name in request.plans]
    todo += [(method, number) for method in request.methods for number in METHODS[method].numbers]
    done = {(row["method"], row["number"]) for row in rows}
    todo = [pair for pair in todo if pair not in done]
    if not todo:
        return rows
    measure = Measure(pipe, request.writing, prompts, say)
    provenance = environment(pipe.model.device)
    for count, (method, number) in enumerate(todo, 1):
        say(f"{count}/{len(todo)}: {method}" + ("" if number is None else f" {number:g}"))
        if number is None:
            way, source = of_plan(pipe, request.plans[method]), "plan"
        else:
            way, source = METHODS[method].way(pipe, number), METHODS[method].source
        row = {"method": method, "number": number, "source": source, **measure.row(way)}
        rows.append(row)
        keep_rows(outputs, request.file, FORMAT, conditions, provenance, rows)
    return rows


def figure_of(rows: Sequence[Row]) -> Figure:
    """Divergence over the measured speed-up of a step: a line for each method."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted((r["step_speedup"], r["kl"]) for r in rows if r["method"] == method)
        speeds, divergences = zip(*points, strict=True)
        marker = "*" if method not in METHODS else "osD^vPX"[number % 7]
        axes.plot(speeds, divergences, marker=marker, linewidth=1.2, label=method)
    axes.set_yscale("log")
    axes.set_xlabel("speed-up of a step over dense (measured)")
    axes.set_ylabel("divergence of masked tokens, nats")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.2)
    return figure
