"""Compare methods person by person: the same shots and the same later queries for all methods."""

from mta.evaluation.compare import run_methods
from mta.evaluation.context import Context
from mta.evaluation.protocol import TestBatch
from mta.evaluation.statistics import Comparison

__all__ = ["Comparison", "Context", "TestBatch", "run_methods"]
