"""The plan of the embedded model and its front: the demo's search and verification, in profiles/tiny-wan.

`--front` writes the front alone, of the search that found the plan that is there. Its costs and sensitivities
lie in the plan; its heads are profiled again, which gives the plan's own errors.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from sparse_dit.demo.run import CALIBRATION, HELD_OUT, SETTINGS, TUNING_PSNR, verified
from sparse_dit.eval.quality import evaluate
from sparse_dit.inputs import load_pipeline
from sparse_dit.patterns.pattern import tile_text
from sparse_dit.plan import Plan
from sparse_dit.resources import shipped
from sparse_dit.search import search_plan
from sparse_dit.search.candidates import tilings
from sparse_dit.search.cost import CostTable
from sparse_dit.search.front import Front, front_of, front_path, model_hash, thinned, write_front
from sparse_dit.search.options import SearchOptions
from sparse_dit.search.profile import ComponentProfile
from sparse_dit.search.profiling import profile_pipeline
from sparse_dit.search.sensitivity import Sensitivity
from sparse_dit.search.solve import Choice, Problem, whole_problem
from sparse_dit.search.solve import evaluate as evaluated

PLAN = Path(__file__).resolve().parent.parent / "profiles" / "tiny-wan" / "plan.json"
STOPS = (
    1.3,
    1.45,
    1.55,
    1.67,
    1.93,
    2.05,
    2.24,
    2.46,
)  # speed-ups that ship, beside the plan's own
AGREES = 1e-3  # relative distance of errors and seconds that are the same


def main() -> None:
    """Search, verify and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PLAN)
    parser.add_argument("--force", action="store_true", help="replace the plan that is there")
    parser.add_argument(
        "--front", action="store_true", help="write the front of the plan that is there"
    )
    options = parser.parse_args()
    if options.out.exists() and not options.force and not options.front:
        parser.error(f"{options.out} exists already: pass --force to replace it")
    pipe = load_pipeline(str(shipped("tiny_wan")), "cpu", "float32")
    if options.front:
        plan = Plan.load(options.out)
        front = front_again(pipe, plan)
    else:
        asked: dict[str, Any] = {"settings": SETTINGS, "min_psnr": TUNING_PSNR}
        searched = search_plan(pipe, CALIBRATION, **asked, tune_on="calibration", report=print)
        quality = evaluate(pipe, searched.plan, HELD_OUT, SETTINGS, noise_cases=0, progress=print)
        plan = verified(searched.plan, quality)
        model, psnr_db = model_hash(plan.components), plan.measured["psnr_db"]
        front = front_of(searched.problem, model, searched.choice, psnr_db=psnr_db)
        plan.save(options.out, overwrite=options.force)
    write_front(thinned(front, (*STOPS, plan.forecast["speedup"])), front_path(options.out))
    written = front_path(options.out) if options.front else options.out
    print(f"wrote {written}: forecast {plan.forecast}, measured {plan.measured}")


def front_again(pipe: Any, plan: Plan) -> Front:
    """The front of the search that found a plan.

    Args:
        pipe: The embedded model.
        plan: The plan, with its cost and the provenance of its search.

    Raises:
        ValueError: If a choice of the plan isn't among the candidates, or has another error or price.
    """
    options = SearchOptions(settings=SETTINGS, min_psnr=TUNING_PSNR, tune_on="calibration")
    profile = profile_pipeline(
        pipe,
        CALIBRATION,
        options.profiled,
        rows=plan.provenance["profile_rows"],
        reference_steps=SETTINGS.steps,
        report=lambda done, total, text: print(f"profile {done}/{total} {text}"),
    )
    ((name, part),) = profile.components.items()
    reference, known = profile.reference, plan.provenance["sensitivity"]
    assert reference is not None
    calls = {name: reference.calls(name, plan.components[name].stages)}
    costs = {name: dict.fromkeys(part.head_sizes, _table(plan, part))}
    matters = {name: Sensitivity(known["stages"], known["layers"])}
    task = whole_problem(profile.components, matters, costs, calls, plan.forecast["dense_seconds"])
    found = _choice_of(plan, task)
    model, psnr_db = model_hash(plan.components), plan.measured["psnr_db"]
    return front_of(task, model, found, psnr_db=psnr_db)


def _table(plan: Plan, part: ComponentProfile) -> CostTable:
    """What attention cost in the plan's search."""
    cost, layout = plan.cost, part.known_layout
    tiles = {tile_text(tile): tile for tile in tilings(layout)}
    points = {far: cost[name] for far, name in ((False, "masked"), (True, "far_field"))}
    return CostTable(
        layout,
        cost["dense_seconds"],
        {far: tuple(map(tuple, listed)) for far, listed in points.items()},
        cost["backend"],
        cost["threads"],
        cost["device"],
        cost["dtype"],
        cost["dense_head_seconds"],
        cost["index_seconds"],
        orders={tiles[text]: times for text, times in cost["orders"].items()},
        in_generation=cost["in_generation"],
    )


def _choice_of(plan: Plan, task: Problem) -> Choice:
    """The plan as a choice of the problem."""
    picks = []
    for unit, (stage, layer, head) in enumerate(task.units):
        part = plan.components[task.components[stage]]
        chosen = part.layers[layer][task.level_of[stage]][head]
        candidates = list(task.candidates[unit])
        if chosen.pattern not in candidates:
            raise ValueError(f"{layer}, stage {stage}, head {head}: another search found the plan")
        picks.append(candidates.index(chosen.pattern))
        error = task.error[unit, picks[-1]].sqrt().item()
        if abs(error - (chosen.error or 0.0)) > AGREES * max(error, AGREES):
            raise ValueError(f"{layer}, stage {stage}, head {head}: {error}, not {chosen.error}")
    choice = evaluated(task, torch.tensor(picks))
    if abs(choice.seconds / plan.forecast["seconds"] - 1) > AGREES:
        raise ValueError(f"the plan takes {choice.seconds} s, not {plan.forecast['seconds']} s")
    return choice


if __name__ == "__main__":
    main()
