"""Training forwards and backwards as captured graphs, one pool per stage; see README.md."""

from .report import GraphReport
from .stage_graphs import Graph, StageGraphs

__all__ = ["Graph", "GraphReport", "StageGraphs"]
