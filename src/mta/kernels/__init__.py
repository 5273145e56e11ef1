"""Compiled CPU kernels for the operations between the matrix products; used where they can be compiled.

``compile`` builds and loads the kernels, ``functions`` adds gradients, ``swap`` puts the kernels into a model.
"""

from mta.kernels.compile import FAMILIES, failure, kernels, obstacle, switched_off, without_kernels
from mta.kernels.functions import TreeAttention, add_low_rank, low_rank_gradients, wide
from mta.kernels.products import AdaptedRows, product
from mta.kernels.swap import use_kernels

__all__ = [
    "FAMILIES",
    "AdaptedRows",
    "TreeAttention",
    "add_low_rank",
    "failure",
    "kernels",
    "low_rank_gradients",
    "obstacle",
    "product",
    "switched_off",
    "use_kernels",
    "wide",
    "without_kernels",
]
