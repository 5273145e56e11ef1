"""Are people better off? Methods on the same shots and the same later queries, compared person by person."""

from mta.evaluation.protocol import Panel
from mta.evaluation.statistics import Comparison, evaluate

__all__ = ["Comparison", "Panel", "evaluate"]
