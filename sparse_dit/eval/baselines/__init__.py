"""Published ways to choose what attention computes, as plans at a wanted density: what ours must beat."""

from .online import rule_plan_at
from .plans import METHODS, SOURCES, least_loss_at_density, plan_at
from .scores import BaselineScores, score_baselines

__all__ = [
    "METHODS",
    "SOURCES",
    "BaselineScores",
    "least_loss_at_density",
    "plan_at",
    "rule_plan_at",
    "score_baselines",
]
