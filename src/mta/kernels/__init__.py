"""Compiled kernels for what lies between the matrix products, on processors; an option that is taken where it can be.

``compile`` builds and loads them, ``functions`` gives them gradients, ``swap`` puts them into a model.
"""

from mta.kernels.compile import is_compiled, kernels, obstacle, without_kernels
from mta.kernels.functions import LogProbs, TreeAttention, add_low_rank, low_rank_gradients, side_by_side, wide
from mta.kernels.products import AdaptedRows, product
from mta.kernels.swap import use_kernels

__all__ = [
    "AdaptedRows",
    "LogProbs",
    "TreeAttention",
    "add_low_rank",
    "is_compiled",
    "kernels",
    "low_rank_gradients",
    "obstacle",
    "product",
    "side_by_side",
    "use_kernels",
    "wide",
    "without_kernels",
]
