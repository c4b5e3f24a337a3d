"""Training forwards and backwards as captured graphs, one pool per stage; see README.md."""

from .replayed_call import Feed
from .report import GraphReport
from .stage_graphs import Graph, StageGraphs
from .stage_graphs import members as graph_members

__all__ = ["Feed", "Graph", "GraphReport", "StageGraphs", "graph_members"]
