"""What a searched plan must beat at equal density: one pattern for all heads, and chance."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...patterns import Pattern
from ...plan import ComponentPlan, HeadChoice, Plan
from ...search.candidates import DENSE, single_stencil, tilings
from ...search.profile import ComponentProfile, Profile
from ...search.seen import density
from ...search.solve import Choice, Problem, evaluate


def uniform_pattern(profile: ComponentProfile, target: float) -> Pattern:
    """The best single pattern of about this density: the stencil (with far field) whose offsets save
    most error on average over all layers, heads and noise levels.

    It contains windows, sliding tiles and multi-diagonals as shapes, so it is the strongest of them.
    """
    tile = tilings(profile.known_layout)[0]
    total: dict[str, torch.Tensor] = {}
    for level, layer in profile.found:
        for head in range(profile.heads[layer][0]):
            for key, value in profile.statistics(level, layer, head)[tile].items():
                total[key] = total.get(key, 0) + value
    low, high = 0.0, 1.0
    best = single_stencil(total, 0.0, tile, profile.known_layout)
    for _ in range(20):  # the density includes the far field, the budget does not
        middle = (low + high) / 2
        pattern = single_stencil(total, middle, tile, profile.known_layout)
        if density(pattern, profile.known_layout) <= target:
            best, low = pattern, middle
        else:
            high = middle
    return best


def uniform_plan(plan: Plan, profile: Profile, *, by_stage: bool) -> Plan:
    """The same pattern for every head, at the density of `plan` or just below.

    Args:
        plan: A searched plan.
        profile: The profile that it was searched from.
        by_stage: Whether each stage gets the density that the searched plan has there (which leaves to
            the search only what it chose head by head), or all stages the same.
    """
    components, reached = {}, 0.0
    for name, component in plan.components.items():
        part = profile.components[name]
        targets = [plan.density] * len(component.stages)
        if by_stage:
            targets = stage_densities(component, part)
        patterns = [DENSE if t > 0.95 else uniform_pattern(part, t) for t in targets]
        shares = plan.provenance["stage_shares"][name]
        reached += sum(
            share * density(p, part.known_layout) for share, p in zip(shares, patterns, strict=True)
        )
        layers = {
            layer: tuple((HeadChoice(pattern),) * num_heads for pattern in patterns)
            for layer, (num_heads, _) in component.heads.items()
        }
        components[name] = replace(component, layers=layers)
    return Plan(plan.pipeline_class, components, min(1.0, round(reached, 6)))


def stage_densities(component: ComponentPlan, profile: ComponentProfile) -> list[float]:
    """Mean density of each stage."""
    result = []
    for stage in range(len(component.stages)):
        heads = [h.pattern for rows in component.layers.values() for h in rows[stage]]
        result.append(sum(density(p, profile.known_layout) for p in heads) / len(heads))
    return result


def random_choice(problem: Problem, target: float, seed: int = 0) -> Choice:
    """Random candidates, one for each unit, exchanged at random until the density is the target's."""
    generator = torch.Generator().manual_seed(seed)
    units, count = problem.density.shape
    pick = torch.randint(count, (units,), generator=generator)
    now, weight = evaluate(problem, pick).density, problem.weight / problem.weight.sum()
    for _ in range(200 * units):
        if abs(now - target) < 0.002:
            break
        unit = int(torch.randint(units, (1,), generator=generator))
        other = int(torch.randint(count, (1,), generator=generator))
        step = weight[unit] * (problem.density[unit, other] - problem.density[unit, pick[unit]])
        if step * (target - now) > 0:
            pick[unit] = other
            now += step.item()
    return evaluate(problem, pick)
