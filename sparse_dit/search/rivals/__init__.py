"""Published ways to choose what attention computes, as plans at a wanted density: what ours must beat."""

from .plans import METHODS, SOURCES, plan_at
from .scores import RivalScores, score_rivals

__all__ = ["METHODS", "SOURCES", "RivalScores", "plan_at", "score_rivals"]
