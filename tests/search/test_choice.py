"""What a search chooses from a stored profile stays what it was.

`python -m tests.search.test_choice` writes it anew.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from sparse_dit.search.assemble import first_plan
from sparse_dit.search.cost import CostTable
from sparse_dit.search.local import improve
from sparse_dit.search.profile_file import read_profile
from sparse_dit.search.sensitivity import Sensitivity
from sparse_dit.search.solve import joined, least_loss, problem, stages_of
from tests.helpers.plan_cases import before_3

GOLDEN = Path(__file__).parents[1] / "golden"
SPEEDUPS = (1.5, 2.5, 4.0)  # of attention, whose cost is its density
NAME = "transformer"


def _chosen():
    """For each speed-up the number of every unit's candidate, and the plan's hash."""
    part = read_profile(GOLDEN / "profile.safetensors").components[NAME]
    stages, layers = stages_of(part.sigmas), len(part.layers)
    total = float(len(stages) * part.total_heads)
    line = ((1e-6, 1e-6), (1.0, 1.0))
    table = CostTable(part.known_layout, 1.0, {False: line, True: line}, "none", 1, "none", "none")
    costs = dict.fromkeys(part.head_sizes, table)
    matters = Sensitivity([4.0, 2.0, 1.0, 0.25], [1 / layers] * layers)
    task = problem(part, stages, matters, costs, [1] * len(stages), total)
    task = joined({NAME: task}, {NAME: 1.0}, total)
    result = {}
    for speedup in SPEEDUPS:
        hull = least_loss(task, speedup)
        choice = improve(task, hull, seconds=total / speedup)
        plan = first_plan("WanPipeline", {NAME: part}, task, choice, {NAME: costs})
        plan = replace(plan, cost={}, forecast={})
        text = json.dumps(before_3(plan.to_dict(), 2), sort_keys=True)
        result[str(speedup)] = {
            "picks": choice.pick.tolist(),
            "density": round(choice.density, 6),
            "plan": hashlib.sha256(text.encode()).hexdigest(),
        }
    return result


def test_a_stored_profile_gives_the_choice_that_it_gave():
    assert _chosen() == json.loads((GOLDEN / "choice.json").read_text())


if __name__ == "__main__":
    (GOLDEN / "choice.json").write_text(json.dumps(_chosen(), indent=1) + "\n")
