"""The geometric starting plans that ship, for published models that nothing was measured on.

`sparse_dit.geometric_plan` makes such a plan for any supported model, by the recipe of its `geometry.py`.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path

from sparse_dit.index import pattern_index
from sparse_dit.layout import Tile, TokenLayout
from sparse_dit.plan import ANY_CONFIG, Plan
from sparse_dit.search.geometry import DENSE_STEPS, NEARBY, NEIGHBOURS, NOTE, Reach, one_pattern


@dataclass(frozen=True)
class Published:
    """What is known of a model from its publication.

    Args:
        name: The name of the plan's folder.
        title: The model's name as its makers write it.
        model: Its id on the hub.
        pipeline_class, model_class: The names of its pipeline's and its transformer's class in diffusers.
        num_heads, head_dim: The heads of a self-attention layer, and the channels of a head.
        layers: The module paths of its self-attention layers, in order.
        layout: The tokens at its usual size.
        height, width, num_frames: That size in pixels and frames.
        steps, guidance: The denoising steps and the guidance scale of a usual generation.
        shift: The shift of its flow-matching schedule at that size; 1 if noise levels are uniform.
        terminal: The noise level that the schedule is stretched to at its last step; None if it isn't.
        tile: The frames, rows and columns of tokens that make a tile.
        sources: Where these numbers are from.
    """

    name: str
    title: str
    model: str
    pipeline_class: str
    model_class: str
    num_heads: int
    head_dim: int
    layers: tuple[str, ...]
    layout: TokenLayout
    height: int
    width: int
    num_frames: int
    steps: int
    guidance: float
    shift: float
    sources: str
    terminal: float | None = None
    tile: Tile = (1, 8, 8)

    @property
    def recipe(self) -> str:
        """File that writes the plan."""
        return f"search/{self.name.replace('.', '_').replace('-', '_')}.py"

    @property
    def sigma_max(self) -> float:
        """Noise level below which attention is sparse: `DENSE_STEPS` of the schedule are above it."""
        sigma = self._shifted(1 - DENSE_STEPS)
        if self.terminal is not None:
            last = self._shifted(1 / self.steps)
            sigma = 1 - (1 - sigma) * (1 - self.terminal) / (1 - last)
        return round(sigma, 4)

    def _shifted(self, left: float) -> float:
        """Noise level where this share of the steps is left."""
        return self.shift * left / (1 + (self.shift - 1) * left)

    @property
    def command(self) -> str:
        """What finds a calibrated plan on the user's machine."""
        return (
            f"sparse-dit search {self.model} --prompts prompts.txt --height {self.height} "
            f"--width {self.width} --num-frames {self.num_frames} --steps {self.steps} "
            f"--guidance {self.guidance:g} --min-psnr 30 --device cuda --dtype bfloat16 --out plan.json"
        )


def ready_plan(model: Published) -> Plan:
    """One pattern for all heads of all layers but the first, at all but the noisiest steps.

    The density is counted from the geometry at the usual size, dense steps and layer included.
    """
    pattern = Reach(tile=model.tile).pattern
    part = one_pattern(
        pattern,
        dict.fromkeys(model.layers[1:], (model.num_heads, model.head_dim)),
        model_class=model.model_class,
        config_hash=ANY_CONFIG,
        layout=model.layout,
        sigma_max=model.sigma_max,
    )
    computed = pattern_index(pattern, model.layout).density
    sparse = (1 - DENSE_STEPS) * (1 - 1 / len(model.layers))
    return Plan(
        model.pipeline_class,
        {"transformer": part},
        round(1 - sparse * (1 - computed), 6),
        forecast={"note": NOTE},
        provenance={
            "note": NOTE,
            "recipe": model.recipe,
            "model": model.model,
            "sources": model.sources,
            "schedule": {
                "steps": model.steps,
                "shift": model.shift,
                "terminal": model.terminal,
            },
            "stage_shares": {"transformer": [1 - DENSE_STEPS]},
            "calibrate": model.command,
        },
    )


def card(model: Published) -> str:
    """The text of the plan's `card.md`."""
    plan = ready_plan(model)
    part = plan.components["transformer"]
    (pattern,) = part.distinct_patterns
    computed = pattern_index(pattern, model.layout).density
    facts = [
        f"For the {model.model_class} of {model.title}, or any with {model.num_heads} heads of "
        f"{model.head_dim} channels and these {len(model.layers)} layers. Facts of the model: "
        f"{model.sources}. The checkpoint itself was not at hand.",
        f"Dense: noise levels above {model.sigma_max:g} (about the first {DENSE_STEPS:.0%} of "
        f"{model.steps} steps at a schedule shift of {model.shift:g}), and the first layer.",
        f"Else every head sees its own frame and {NEIGHBOURS} on either side, the same place in all "
        f"frames with {NEARBY:.1%} of the rows and columns on either side, the first frame and all "
        "text; what is left is pooled (far field).",
        f"Density at {model.width}x{model.height}, {model.num_frames} frames "
        f"({model.layout.seq_len:,} tokens): {computed:.3f} in a sparse layer, {plan.density:.3f} over "
        "a generation. That is counted, not measured, and it is no speed-up.",
        f"Written by `python {model.recipe} --force`.",
    ]
    listed = "\n".join(textwrap.fill(f"- {fact}", 110, subsequent_indent="  ") for fact in facts)
    command = model.command.replace(" --height", " \\\n    --height").replace(
        " --min-psnr", " \\\n    --min-psnr"
    )
    return (
        f"# {model.name}\n\n**Uncalibrated: geometry only.** A starting plan for {model.title}: no "
        "attention of this model was\nlooked at, no picture was compared, nothing was timed.\n\n"
        f"{listed}\n\nA plan that is calibrated and verified on your machine:\n\n    {command}\n\n"
        f'It then goes in the place of this one: `sparse_dit.patch(pipe, "plan.json")`.\n'
    )


def write(model: Published, folder: Path, *, overwrite: bool = False) -> None:
    """Write `plan.json` and `card.md` into `folder`.

    Raises:
        PlanError: If there is a plan already and `overwrite` is False.
    """
    ready_plan(model).save_pretrained(folder, overwrite=overwrite)
    (folder / "card.md").write_text(card(model), encoding="utf-8")


def main(model: Published, recipe: str) -> None:
    """Command line of a recipe.

    Args:
        model: What it knows of the model.
        recipe: Its own file, in a folder beside `profiles`.
    """
    profiles = Path(recipe).resolve().parent.parent / "profiles"
    parser = argparse.ArgumentParser(
        description=f"Write the geometric starting plan of {model.title}."
    )
    parser.add_argument("--out", type=Path, default=profiles / model.name, help="folder")
    parser.add_argument("--force", action="store_true", help="replace the plan that is there")
    options = parser.parse_args()
    write(model, options.out, overwrite=options.force)
    print(f"wrote {options.out}")
