"""Strategy files of Sliding Tile Attention: from plans, and to plans."""

from .export import Exported, export_sta, flow_sigmas, sigmas_of
from .importing import import_sta
from .strategy import Strategy

__all__ = ["Exported", "Strategy", "export_sta", "flow_sigmas", "import_sta", "sigmas_of"]
