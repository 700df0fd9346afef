"""Plans made for a pipeline without a search: every head finds its blocks while it generates.

`RULES` are the names that `patch` takes in the place of a plan. Besides our own, they are published methods
with their own defaults; where ours depart from a paper stands at each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .curve import Curve
from .integrations import components, heads_of, host_of
from .layout import TokenLayout
from .patterns import Above, Antidiagonal, Budget, Cluster, Dense, Mass, Pattern, Pooled, Share
from .plan import ComponentPlan, HeadChoice, Plan, Stage, config_hash
from .version import VERSION
from .words import option

BLOCK = 64  # tokens
ANY_SIZE = TokenLayout.sequence(4096)  # a plan names one, but these hold at every size
DENSE = Pattern(Dense())
RASTER = (None, None, None)  # the model's own token order


@dataclass(frozen=True)
class Rule:
    """A way to run without a plan.

    Args:
        source: What it is, in words.
        option: The one number that it takes: its name, default, least and greatest value.
        stages: From that number and a function that says which noise level is reached after a share of the
            steps: what all heads do down to a level, in order, the last to 0.
        density: From that number: the density of a generation; the most that it can be, where calls decide.
        exact: Whether `density` is met.
        dense_layers: So many first layers are dense.
    """

    source: str
    option: tuple[str, float, float, float]
    stages: Callable[[float, Callable[[float], float]], Sequence[tuple[float, Pattern]]]
    density: Callable[[float], float]
    exact: bool = True
    dense_layers: int = 0


Levels = Callable[[float], float]
Stages = Sequence[tuple[float, Pattern]]


DENSE_STEPS = 0.25  # of all, at most
EARLY = 0.5  # of all: the steps up to here have twice the density of the others
REFRESH = 6  # steps


def _online(density: float, level: Levels) -> Stages:
    """Ours. Errors of early steps move the video the most, so these get the more of the density."""
    dense = min(DENSE_STEPS, 0.55 * density)
    late = (density - dense) / (2 * (EARLY - dense) + 1 - EARLY)
    if 2 * late > 1:
        late = (density - EARLY) / (1 - EARLY)

    def pattern(share: float) -> Pattern:
        keys = min(1.0, max(0.0, (share - 1 / BLOCK) / (1 - 1 / BLOCK)))  # beside the pooled ones
        keep = Budget(beta=keys, least=1)
        above = level(dense)
        return Pattern(Pooled(keep, own_order=True, dense_above=above, refresh=REFRESH), far=True)

    return [(level(EARLY), pattern(min(1.0, 2 * late))), (0.0, pattern(late))]


def _adaspa(sparsity: float, level: Levels) -> Stages:
    """AdaSpa, https://arxiv.org/abs/2502.21079: blocks of 64 by exact mass, found after 20 and 60 % of it.

    Its second search takes no output from that step, ours does: the step is dense.
    """
    keep = Budget(beta=1 - sparsity, least=1)
    first = Pattern(Mass(keep, adaptive=True, dense_above=level(0.2)), tile=RASTER, cell=BLOCK)
    again = Pattern(Mass(keep, adaptive=True), tile=RASTER, cell=BLOCK)
    return [(level(0.6), first), (0.0, again)]


def _xattention(threshold: float, level: Levels) -> Stages:
    """XAttention, https://arxiv.org/abs/2503.16428, with the settings of its video experiments.

    Five of 50 steps are dense, the stride is 8, blocks are of 128 tokens in their own order.
    """
    shape = Antidiagonal(Share(threshold, least=1), stride=8)
    return [(level(0.1), DENSE), (0.0, Pattern(shape, tile=RASTER, cell=2 * BLOCK))]


def _sol(tau: float, level: Levels) -> Stages:
    """Sol-Attn, https://arxiv.org/abs/2607.24027: blocks of 64 whose pooled logit is above its row's mean.

    The first fifth of the steps and the first layer are dense, and what isn't seen is pooled. Blocks follow a
    Hilbert curve instead of a Morton one; a row's deviation is that of its logits, not an estimate from the
    keys' variances.
    """
    pattern = Pattern(Pooled(Above(tau), local=2), tile=Curve("video", tokens=BLOCK), far=True)
    return [(level(0.2), DENSE), (0.0, pattern)]


def _svg2(top_p: float, level: Levels) -> Stages:
    """SVG2, https://arxiv.org/abs/2505.18875, with its settings for Wan; see `Cluster` for what departs.

    The first fifth of the steps and the first layer are dense; clusters go on from those of the step before.
    """
    return [(level(0.2), DENSE), (0.0, Pattern(Cluster(Share(top_p, 1))))]


RULES: dict[str, Rule] = {
    "online": Rule(
        "ours: pooled queries and keys, each head in its own token order, the rest pooled",
        ("density", 0.3, 0.05, 1.0),
        _online,
        lambda density: density,
    ),
    "adaspa": Rule(
        "AdaSpa (arXiv 2502.21079)",
        ("sparsity", 0.8, 0.0, 1.0),
        _adaspa,
        lambda sparsity: 0.2 + 0.8 * (1 - sparsity),
    ),
    "xattention": Rule(
        "XAttention (arXiv 2503.16428)",
        ("threshold", 0.95, 0.0, 1.0),
        _xattention,
        lambda threshold: 0.1 + 0.9 * threshold,  # see blockwise.density
        exact=False,
    ),
    "sol": Rule(
        "Sol-Attn (arXiv 2607.24027)",
        ("tau", 0.5, 0.0, 64.0),
        _sol,
        lambda tau: 0.2 + 0.8 / (1 + tau**2),
        exact=False,
        dense_layers=1,
    ),
    "svg2": Rule(
        "SVG2 (arXiv 2505.18875)",
        ("top_p", 0.9, 0.0, 1.0),
        _svg2,
        lambda top_p: 0.2 + 0.8 * max(0.1, top_p),
        exact=False,
        dense_layers=1,
    ),
}


def online_plan(model: Any, name: str = "online", **options: float) -> Plan:
    """The plan of a rule in `RULES` for a pipeline, or for one of its transformers. Nothing is run.

    Args:
        model: A pipeline of diffusers, or its transformer.
        name: A name in `RULES`.
        options: The rule's one number, by its name: `density` of a generation, dense steps included, for
            `"online"`; `sparsity`, `threshold` and `tau`, of the calls that aren't dense, for the others.

    Raises:
        ValueError: If there is no such rule, or it doesn't take an option or its value.
        NotImplementedError: If the model is no diffusion transformer.
    """
    if name not in RULES:
        raise ValueError(f"a rule without a plan must be one of {sorted(RULES)}, got {name!r}")
    rule, found = RULES[name], components(model)
    value = rule_number(name, rule.option, options)
    host = host_of(model)
    if not hasattr(host, "noise_level"):
        raise NotImplementedError(
            f"{name!r} is for diffusion transformers, and {type(model).__name__} is none: "
            'language models take a plan, or "exact"; one that denoises text must see both ways '
            "(config.is_causal=False), and config.mask_token_id or its pipeline say what its mask token is"
        )
    stages = rule.stages(value, lambda share: host.noise_level(model, share))
    parts = {part: _component(module, stages, rule.dense_layers) for part, module in found.items()}
    note = f"{name}: blocks are found while generating, nothing was measured of this model"
    if not rule.exact:
        note += "; calls decide on the density, and the plan's is the most that it can be"
    return Plan(
        "" if model in found.values() else type(model).__name__,
        parts,
        min(1.0, max(0.0, rule.density(value))),
        {"rule": {"name": name, rule.option[0]: value}, "sparse_dit": VERSION},
        {"note": note},
    )


def rule_number(
    name: str, number: tuple[str, float, float, float], options: Mapping[str, float]
) -> float:
    """The one number that a rule takes.

    Args:
        name: The rule's name.
        number: The number's name, default, least and greatest value.
        options: What is given.

    Raises:
        ValueError: If something else is given, or the number is out of range.
    """
    wanted, default, least, most = number
    if other := sorted(set(options) - {wanted}):
        raise ValueError(f"{name!r} takes {option(wanted)}, not {', '.join(map(option, other))}")
    value = options.get(wanted, default)
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not sound or not least <= value <= most:
        raise ValueError(
            f"{option(wanted)} must be a number from {least:g} to {most:g}, got {value!r}"
        )
    return float(value)


def _component(transformer: Any, stages: Stages, dense_layers: int) -> ComponentPlan:
    heads = heads_of(transformer)
    top, listed, patterns = 1.0, [], []
    for level, pattern in stages:
        if level < top:
            listed.append(Stage(top, level))
            patterns.append(pattern)
            top = level
    layers = {}
    for number, (layer, (count, _)) in enumerate(heads.items()):
        own = [DENSE if number < dense_layers else pattern for pattern in patterns]
        layers[layer] = tuple((HeadChoice(pattern),) * count for pattern in own)
    return ComponentPlan(
        type(transformer).__name__,
        config_hash(transformer.config),
        heads,
        ANY_SIZE,
        tuple(listed),
        layers,
    )
