"""The offline stage: profile, score, cost, solve, verify."""

from .engine import Objective, Searched, search, search_plan

__all__ = ["Objective", "Searched", "search", "search_plan"]
