"""Plans: which pattern each attention head computes, found offline, kept in a file.

`profiles/README.md` is the normative description of the file.
"""

from .compare import diff, merge, summary_rows
from .component import ComponentPlan, HeadChoice, Stage
from .errors import PlanError
from .hub import built_in
from .identity import config_hash
from .plan import ANY_CONFIG, Plan

__all__ = [
    "ANY_CONFIG",
    "ComponentPlan",
    "HeadChoice",
    "Plan",
    "PlanError",
    "Stage",
    "built_in",
    "config_hash",
    "diff",
    "merge",
    "summary_rows",
]
