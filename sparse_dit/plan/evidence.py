"""What a search noted of how far off its choice may be; see `provenance.evidence` in the plan format."""

from __future__ import annotations

from typing import Any

from .plan import Plan


def evidence_lines(plan: Plan) -> list[str]:
    """What backs a searched plan's choice, in words; none for other plans."""
    found = plan.provenance.get("evidence")
    if not isinstance(found, dict):
        return []
    lines = []
    row_error, gap = found.get("row_error"), found.get("gap")
    if isinstance(row_error, int | float):
        lines.append(f"expected error: standard error {row_error:.1%}, from sampled rows alone")
    if isinstance(gap, int | float):
        lines.append(f"no other choice as fast has an expected error lower by more than {gap:.2%}")
    lines += _repeated(found.get("repeated")) + _over_prompts(plan)
    if sparse := _sparse_heads(plan):
        marked = len(prompt_dependent(plan))
        lines.append(f"best places depend on the prompt: {marked} of {sparse} sparse heads")
    return lines


def _repeated(found: Any) -> list[str]:
    """How alike repeated searches would choose, in words."""
    if not isinstance(found, dict):
        return []
    match found.get("spread"), found.get("same"), found.get("density"):
        case int() | float() as spread, int() | float() as same, int() | float() as density:
            return [
                f"searched again, with timings off by {spread:.1%} each, {same:.0%} of the heads choose the "
                f"same, and the density differs by at most {density:.4f}"
            ]
    return []


def _over_prompts(plan: Plan) -> list[str]:
    """How far the verified prompts are apart, in words."""
    match plan.measured.get("psnr_db_least"), plan.measured.get("psnr_db_most"):
        case int() | float() as least, int() | float() as most:
            return [f"verified prompts are from {least:.1f} to {most:.1f} dB"]
    if plan.measured.get("timed_pairs") == 1:
        return ["verified on one prompt: others may differ from it by several dB"]
    return []


def prompt_dependent(plan: Plan) -> set[tuple[str, str, int, int]]:
    """`(component, layer, stage, head)` of heads whose best places depend on the prompt."""
    found = plan.provenance.get("evidence")
    marked = found.get("prompt_dependent") if isinstance(found, dict) else None
    result = set()
    for name, layers in (marked if isinstance(marked, dict) else {}).items():
        for layer, places in (layers if isinstance(layers, dict) else {}).items():
            for place in places if isinstance(places, list) else []:
                match place:
                    case [int(stage), int(head)]:
                        result.add((name, layer, stage, head))
    return result


def without_evidence(provenance: dict[str, Any]) -> dict[str, Any]:
    """The provenance of another choice from the same search."""
    return {key: value for key, value in provenance.items() if key != "evidence"}


def _sparse_heads(plan: Plan) -> int:
    """How many heads of a plan are sparse, counted over all stages and layers."""
    return sum(
        not head.pattern.is_dense
        for part in plan.components.values()
        for stages in part.layers.values()
        for heads in stages
        for head in heads
    )
