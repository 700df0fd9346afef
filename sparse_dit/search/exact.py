"""The best choice, proved: the multiple-choice knapsack as an integer program, solved by HiGHS.

For small cases, and to say how far from the best a choice of the Lagrangian can be at most. HiGHS:
Huangfu and Hall, https://doi.org/10.1007/s12532-017-0130-5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from .solve import Choice, Problem, evaluate, least_loss

RELATIVE_GAP = 1e-7  # HiGHS stops when the best choice is proved to this
_STOP = 1e-6  # and at this difference of what it makes small, which SciPy can't change
_SCALE = 1e4  # so a known choice has this loss to HiGHS
_TRIES = 4  # HiGHS keeps a limit to a tolerance: solved again, as much tighter as it went over


@dataclass(frozen=True, eq=False)
class Exact:
    """The best choice that is known, and what is proved of the best that there is.

    Args:
        choice: The one of least loss that was found.
        bound: No choice that is as fast has less loss than this.
        gap: `(choice.loss - bound) / choice.loss`, from 0 (it is the best) to 1 (nothing known).
        optimal: Whether HiGHS came to an end before its time.
    """

    choice: Choice
    bound: float
    gap: float
    optimal: bool


def exact_least_loss(problem: Problem, speedup: float, *, time_limit: float = 60.0) -> Exact | None:
    """The choice of least loss that reaches the speed-up; None if none does.

    If time runs out it is the better one of what HiGHS found and the Lagrangian's, with the bound that
    was proved by then.

    Args:
        problem: The units, with what each of their candidates costs and spoils; a layer whose heads are all
            dense costs its stock seconds.
        speedup: The least speed-up against a dense generation.
        time_limit: The seconds that the solver HiGHS may take.

    Raises:
        ValueError: If a number is out of range.
    """
    for name, value in (("speedup", speedup), ("time_limit", time_limit)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return _solved(problem, problem.dense_seconds / speedup, time_limit)


def certify(problem: Problem, choice: Choice, *, time_limit: float = 60.0) -> Exact:
    """How far a choice is from the best one that is as fast: `gap` of what is returned.

    Args:
        problem: The problem that the choice is of.
        choice: Any choice of the problem.
        time_limit: The seconds that the solver HiGHS may take.

    Returns:
        The choice given, with bound and gap; `optimal` says whether the bound is the best there is.

    Raises:
        ValueError: If the time limit is out of range.
    """
    if not (math.isfinite(time_limit) and time_limit > 0):
        raise ValueError(f"time_limit must be a finite number above 0, got {time_limit!r}")
    found = _solved(problem, choice.seconds, time_limit, known=choice)
    assert found is not None, "the choice itself is as fast"
    bound = min(found.bound, choice.loss)
    return Exact(choice, bound, _gap(choice.loss, bound), found.optimal)


def worth_trying(problem: Problem) -> Tensor:
    """Candidates that some best choice may need, bool `[U, K]`; dense (number 0) beside sparse heads.

    One that another is neither slower nor worse than is left out; of equal ones the first stays. Against
    the dense one that holds only where a layer that becomes all dense by it doesn't get slower.
    """
    seconds, loss = problem.seconds, problem.loss
    units, count = seconds.shape
    slower = torch.zeros(int(problem.layer_of.max()) + 1, dtype=torch.float64)
    slower.index_add_(0, problem.layer_of, problem.stock_seconds - seconds[:, 0])
    dense_counts = slower[problem.layer_of] <= 0
    keep = torch.ones(units, count, dtype=torch.bool)
    for other in range(count):
        s, d = seconds[:, other, None], loss[:, other, None]
        no_worse = (s <= seconds) & (d <= loss)
        better = no_worse & ((s < seconds) | (d < loss))
        better |= no_worse & (torch.arange(count) > other)
        better[:, other] = False
        if other == 0:
            better &= dense_counts[:, None]
        keep &= ~better
    return keep


def _solved(
    problem: Problem, limit: float, time_limit: float, known: Choice | None = None
) -> Exact | None:
    """Least loss within `limit` seconds of a generation."""
    lagrangian = least_loss(problem, problem.dense_seconds / limit)
    if lagrangian is not None and (known is None or lagrangian.loss < known.loss):
        known = lagrangian if lagrangian.seconds <= limit else known
    if known is not None and known.loss <= 0:
        return Exact(known, 0.0, 0.0, True)
    program = _Program(problem, None if known is None else known.loss)
    bound, optimal, aim = 0.0, False, limit
    for attempt in range(_TRIES):
        result = program.run(aim, time_limit)
        if attempt == 0:
            if result.status == 2:  # infeasible, if not by a rounding
                return None if known is None else Exact(known, known.loss, 0.0, True)
            bound = max(0.0, ((result.mip_dual_bound or 0.0) - _STOP) * program.loss_unit)
            optimal = result.status == 0
        if result.x is None:
            break
        choice = program.choice(result.x)
        if choice.seconds <= limit:
            if known is None or choice.loss < known.loss:
                known = choice
            break
        aim -= 2 * (choice.seconds - limit)
    if known is None:
        raise TimeoutError(
            f"HiGHS must find a choice, found none in {time_limit:g} s; give it more time_limit"
        )
    bound = min(bound, known.loss)
    return Exact(known, bound, _gap(known.loss, bound), optimal)


class _Program:
    """The integer program of a problem: V variables, one for each layer (stock) and candidate.

    A unit takes one of its candidates, or its layer is stock; a layer that isn't has a sparse head.
    """

    def __init__(self, problem: Problem, known: float | None) -> None:
        """Build the program; candidates whose loss alone is above `known` are left out, if it is given."""
        self.problem = problem
        unit, candidate = worth_trying(problem).nonzero(as_tuple=True)
        layer = problem.layer_of
        layers, units = int(layer.max()) + 1, len(problem.units)
        stock, dense = (torch.zeros(layers, dtype=torch.float64) for _ in range(2))
        stock.index_add_(0, layer, problem.stock_seconds)
        dense.index_add_(0, layer, problem.loss[:, 0])
        self.unit, self.candidate, self.layers = unit, candidate, layers
        self.seconds = torch.cat([stock, problem.seconds[unit, candidate]]).numpy()
        loss = torch.cat([dense, problem.loss[unit, candidate]]).numpy()
        most = float(loss.max()) or 1.0 if known is None else known
        self.loss_unit = most / _SCALE
        self.allowed = (loss <= most * (1 + 1e-9)).astype(float)
        self.loss = np.where(self.allowed, loss, 0.0) / self.loss_unit
        variables = layers + len(unit)
        place = torch.arange(len(unit)) + layers
        rows = torch.cat([unit, torch.arange(units)])
        columns = torch.cat([place, layer])
        once = coo_array((np.ones(len(rows)), (rows, columns)), shape=(units, variables)).tocsr()
        is_dense = candidate == 0
        rows, columns = layer[unit[is_dense]], place[is_dense]
        some = coo_array((np.ones(len(rows)), (rows, columns)), shape=(layers, variables)).tocsr()
        heads = torch.bincount(layer, minlength=layers).numpy()
        self.constraints = [
            LinearConstraint(once, 1, 1),
            LinearConstraint(some, -np.inf, heads - 1),  # pyright: ignore[reportArgumentType]
        ]

    def run(self, limit: float, time_limit: float) -> Any:
        """SciPy's result for so many seconds of a generation."""
        budget = limit - self.problem.other_seconds
        scale = 1e3 / max(abs(budget), 1e-12)  # HiGHS' tolerance is absolute
        row = LinearConstraint((self.seconds * scale)[None], -np.inf, budget * scale)
        return milp(
            self.loss,
            integrality=np.ones(len(self.loss)),
            bounds=Bounds(0, self.allowed),  # pyright: ignore[reportArgumentType]
            constraints=[*self.constraints, row],
            options={"time_limit": time_limit, "mip_rel_gap": RELATIVE_GAP},
        )

    def choice(self, solution: np.ndarray) -> Choice:
        """What a solution says."""
        taken = torch.from_numpy(solution[self.layers :] > 0.5)
        pick = torch.zeros(len(self.problem.units), dtype=torch.int64)
        pick[self.unit[taken]] = self.candidate[taken]
        return evaluate(self.problem, pick)


def _gap(loss: float, bound: float) -> float:
    return 0.0 if loss <= 0 else max(0.0, (loss - bound) / loss)
