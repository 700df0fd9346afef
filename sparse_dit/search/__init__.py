"""The offline stage: profile, score, cost, solve, verify."""

from .assemble import plan_of
from .engine import Objective, Searched, search, search_plan

__all__ = ["Objective", "Searched", "plan_of", "search", "search_plan"]
