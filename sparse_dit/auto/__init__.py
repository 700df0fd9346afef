"""`patch(pipe, "auto")`: a plan that is learned from the user's own generations, and kept."""

from .options import AutoOptions
from .session import attach_auto
from .store import PlanStore

__all__ = ["AutoOptions", "PlanStore", "attach_auto"]
