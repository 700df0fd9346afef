"""Rules without a plan for diffusion language models: what heads see is found while text is denoised.

Each is a plan made of a model's layers alone. `sigma` of a stage is the share of a block's tokens that is
masked still, so that it takes the place of a share of the block's steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .integrations import components, heads_of, host_of
from .online import ANY_SIZE, RULES, rule_number
from .patterns import Budget, Dense, Mass, Pattern, Pooled
from .plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from .version import VERSION

FIRST = 0.999  # only where all of a block is masked there is more
BLOCK = 128  # tokens


@dataclass(frozen=True)
class DenoisingRule:
    """A way to run a diffusion language model without a plan.

    Args:
        source: What it is, in words.
        option: The one number that it takes: its name, default, least and greatest value.
        pattern: From that number: what all heads do.
        density: From that number: about what share of the pairs is computed over a generation.
    """

    source: str
    option: tuple[str, float, float, float]
    pattern: Callable[[float], Pattern]
    density: Callable[[float], float]


def sparsed(keep: float, block: int = BLOCK) -> Pattern:
    """SparseD, https://arxiv.org/abs/2509.24014, as the paper says, with its settings of long prompts.

    The first 20 % of the steps are dense, and the last of them counts each block's probability. From there
    on each block of 128 queries sees the share `keep` of the blocks of keys with the most, of the prompt and
    of the generated tokens each on its own. In a pipeline that writes block after block the steps are a
    block's.

    Args:
        keep: Share of the keys.
        block: Tokens; the paper takes 32 for short prompts.
    """
    shape = Mass(Budget(beta=keep, least=block), isolated=True, dense_above=0.8)
    return Pattern(shape, tile=(1, 1, block))


def mage(keep: float, block: int = BLOCK) -> Pattern:
    """MAGE, https://arxiv.org/abs/2602.14209: keys chosen once a block, in an exact step while all is masked.

    The paper chooses keys of a cache for the block's own queries; where a pipeline computes all tokens in
    every step, each block of queries chooses its own.

    Args:
        keep: Share of the keys.
        block: Tokens.
    """
    shape = Mass(Budget(beta=keep, least=block), dense_above=FIRST, canvas=True)
    return Pattern(shape, tile=(1, 1, block))


SETTLED = 64  # steps


def online(density: float) -> Pattern:
    """Ours. What isn't being denoised is computed at a generation's first step, and every `SETTLED` later.

    What is, and the last tokens before it, see everything in every step.

    Args:
        density: Share of the keys that a token sees exactly in that first step; the rest is pooled, and the
            block that is denoised sees everything and is seen by all.
    """
    if density >= 1:
        return Pattern(Dense(), settled_every=SETTLED)
    shape = Pooled(Budget(beta=density, least=1), local=1, canvas=True)
    return Pattern(shape, tile=(1, 1, BLOCK // 2), far=True, settled_every=SETTLED)


DENOISING: dict[str, DenoisingRule] = {
    "online": DenoisingRule(
        "ours: what isn't being denoised is computed at a generation's first step alone",
        ("density", 1.0, 0.01, 1.0),
        online,
        lambda density: density / 16,
    ),
    "sparsed": DenoisingRule(
        "SparseD (arXiv 2509.24014)",
        ("keep", 0.3, 0.0, 1.0),
        sparsed,
        lambda keep: 0.2 + 0.8 * keep,
    ),
    "mage": DenoisingRule(
        "MAGE (arXiv 2602.14209)",
        ("keep", 0.3, 0.0, 1.0),
        mage,
        lambda keep: 0.1 + 0.9 * keep,
    ),
}


def denoising_plan(model: Any, name: str = "online", **options: float) -> Plan:
    """The plan of a rule in `DENOISING` for a diffusion language model or its pipeline. Nothing is run.

    Args:
        model: A pipeline (`LLaDA2Pipeline`, `DiffusionGemmaPipeline`), or a model of transformers that sees
            both ways and says what its mask token is (`config.mask_token_id`) or that it has canvases.
        name: A name in `DENOISING`.
        options: The rule's one number, by its name.

    Raises:
        ValueError: If there is no such rule, or it doesn't take an option or its value.
        NotImplementedError: If the model is no diffusion language model.
    """
    if name not in DENOISING:
        raise ValueError(f"a rule for text must be one of {sorted(DENOISING)}, got {name!r}")
    rule, ((part, module),) = DENOISING[name], components(model).items()
    value = rule_number(name, rule.option, options)
    layers = denoising_layers(model)
    if not layers:
        raise NotImplementedError(
            f"{name!r} is for diffusion models, and {type(model).__name__} is none that is known: its layers "
            "must see both ways (config.is_causal=False), and config.mask_token_id or the pipeline must say "
            'what the mask token is; other language models take a plan, or "exact"'
        )
    heads, pattern = heads_of(module), rule.pattern(value)
    planned = {layer: ((HeadChoice(pattern),) * heads[layer][0],) for layer in layers}
    share, note = min(1.0, rule.density(value)), "found while text is denoised"
    if name == "online" and canvas_length(module) is not None:
        share = value
        note = "dense: beside a cache nothing but the canvas is computed" if value >= 1 else note
    component = ComponentPlan(
        type(module).__name__,
        config_hash(module.config),
        {layer: heads[layer] for layer in layers},
        ANY_SIZE,
        (Stage(1.0, 0.0),),
        planned,
    )
    return Plan(
        "" if model is module else type(model).__name__,
        {part: component},
        share,
        {"rule": {"name": name, rule.option[0]: value}, "sparse_dit": VERSION},
        {"note": f"{name}: {note}, nothing was measured of this model"},
    )


def canvas_length(model: Any) -> int | None:
    """Tokens of the canvas that a model denoises beside a cache of all others; None for other models."""
    return getattr(model.config, "canvas_length", None)


def of_text(model: Any, name: str) -> bool:
    """Whether a rule's name means the one for diffusion language models, for a model or pipeline."""
    return name not in RULES or bool(denoising_layers(model))


def denoising_layers(model: Any) -> list[str]:
    """The attention layers of a diffusion language model that see both ways; none of other models.

    Args:
        model: A model or pipeline of any library.
    """
    found = getattr(host_of(model), "denoising_layers", None)
    return [] if found is None else found(model)
