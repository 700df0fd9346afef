"""Published ways to choose what attention computes, as plans at a wanted density: what ours must beat."""

from .plans import METHODS, SOURCES, least_damage_at_density, plan_at
from .scores import RivalScores, score_rivals

__all__ = [
    "METHODS",
    "SOURCES",
    "RivalScores",
    "least_damage_at_density",
    "plan_at",
    "score_rivals",
]
