"""Training forwards and backwards as captured graphs, one pool per stage; see README.md."""

from .replayed_call import Feed
from .report import GraphReport
from .stage_graphs import Graph, StageGraphs

__all__ = ["Feed", "Graph", "GraphReport", "StageGraphs"]
