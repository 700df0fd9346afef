"""What a search says of a goal that it missed."""

import math
from dataclasses import replace

import pytest

from sparse_dit.search import Objective
from sparse_dit.search.objective import shortfall
from tests.helpers.eval_cases import made_up_plan


def _plan(objective, **measured):
    return replace(
        made_up_plan(),
        provenance={"objective": objective},
        forecast={"speedup": 1.6},
        measured={"psnr_db": 27.24, "speedup": 1.44, **measured},
    )


@pytest.mark.parametrize("met", [True, None])
def test_nothing_is_said_of_a_goal_that_was_met_or_can_not_be_known(met):
    assert shortfall(_plan({"min_psnr": 30.0}, met=met)) is None
    assert shortfall(made_up_plan()) is None


def test_a_missed_goal_is_said_with_the_best_there_is():
    said = shortfall(_plan({"min_psnr": 30.0}, met=False))
    assert said and "30 dB were asked for" in said and "27.2 dB" in said and "1.60x" in said
    said = shortfall(_plan({"target_speedup": 1.5}, met=False))
    assert said and "1.5x was asked for" in said and "forecasts 1.60x" in said and "1.44x" in said


def test_no_video_is_better_than_equal():
    with pytest.raises(ValueError, match="at most 100, what equal videos count as, got 120"):
        Objective(min_psnr=120.0)
    assert Objective(min_psnr=100.0).min_psnr == 100
    with pytest.raises(ValueError, match="finite"):
        Objective(min_psnr=math.inf)
