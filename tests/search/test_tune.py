"""The rounds of tuning, on a made-up problem whose runs give a known multiple of the forecast loss."""

import math
from types import SimpleNamespace

import pytest
import torch

from sparse_dit.generation import GenerationSettings
from sparse_dit.patterns import Dense, Pattern, Window
from sparse_dit.plan import Stage
from sparse_dit.search import tune
from sparse_dit.search.options import SearchOptions
from sparse_dit.search.solve import Problem
from sparse_dit.search.tune import FIRST_SCALE, MARGIN_DB, MAX_ROUNDS, RELAX_DB, Session
from sparse_dit.search.verify import Verified

WANTED = 30.0
OPTIONS = SearchOptions(settings=GenerationSettings(64, 64), min_psnr=WANTED)
PATTERNS = (Pattern(Dense()), Pattern(Window(1)))


def _problem(units=400):
    """Each unit saves the same time; losses spread over five decades, so any limit can be hit."""
    loss = torch.logspace(-8, -3, units, dtype=torch.float64)
    both = torch.tensor([[1.0, 0.4]], dtype=torch.float64).expand(units, 2).contiguous()
    error = torch.stack([torch.zeros_like(loss), torch.ones_like(loss)], 1)
    return Problem(
        [(0, "blocks.0.attn1", head) for head in range(units)],
        [PATTERNS] * units,
        loss,
        both,
        both[:, 0],
        error,
        both,
        1 - error,
        torch.full((units,), 1 / units, dtype=torch.float64),
        (Stage(1.0, 0.0),),
        1.0,
    )


@pytest.fixture
def tuned(monkeypatch):
    """Runs `tune` where a run's error is `scale` times the forecast: each round's PSNR, and the end.

    A list of scales has one for each round.
    """

    def run(scale, *, budget=math.inf):
        task, seen = _problem(), []

        def verified(work, plan, references, backend):
            factor = scale[len(seen)] if isinstance(scale, list) else scale
            mse = factor * plan.loss
            seen.append(-10 * math.log10(mse))
            return Verified({"mse": mse, "psnr_db": seen[-1]}, 1.3, 10.0)

        monkeypatch.setattr(tune, "verify", verified)
        monkeypatch.setattr(Session, "plan", lambda self, choice: choice)
        work = SimpleNamespace(loss="mse", quality="psnr_db")
        session = Session(OPTIONS, work, "", task, None, None)
        clock = SimpleNamespace(elapsed=0.0)
        return seen, tune.tune(session, [], budget, clock)

    return run


def test_a_first_guess_inside_the_margin_is_the_only_round(tuned):
    rounds, (_, _, verified) = tuned(FIRST_SCALE)
    assert len(rounds) == 1
    assert WANTED <= verified.difference["psnr_db"] <= WANTED + RELAX_DB
    assert verified.difference["psnr_db"] == pytest.approx(WANTED + MARGIN_DB, abs=0.3)


@pytest.mark.parametrize("scale", [0.5, 4.0, 25.0, 200.0])
def test_a_wrong_first_guess_takes_one_more_round(tuned, scale):
    rounds, (_, _, verified) = tuned(scale)
    assert len(rounds) <= 2
    assert WANTED <= verified.difference["psnr_db"] <= WANTED + RELAX_DB


def test_a_plan_that_is_good_enough_is_not_improved_beyond_the_budget(tuned):
    rounds, (_, _, verified) = tuned(0.5, budget=5.0)
    assert len(rounds) == 1 and verified.difference["psnr_db"] > WANTED + RELAX_DB


def test_a_plan_that_is_not_good_enough_is_improved_beyond_the_budget(tuned):
    rounds, (_, _, verified) = tuned(200.0, budget=5.0)
    assert len(rounds) == 2 and verified.difference["psnr_db"] >= WANTED


def test_if_no_round_reaches_the_goal_the_nearest_one_is_kept(tuned):
    rounds, (_, _, verified) = tuned([50.0, 100.0, 800.0, 6400.0])
    assert len(rounds) == MAX_ROUNDS and max(rounds) < WANTED
    assert verified.difference["psnr_db"] == max(rounds) == rounds[1]
