"""Fast paths, each with a plain reference beside it."""

from dist_moe.kernels.dropout import dropout, dropout_of_stacks
from dist_moe.kernels.grouped_linear import grouped_linear, grouped_linear_reference
from dist_moe.kernels.weighted_scatter import weighted_scatter, weighted_scatter_reference

__all__ = [
    "dropout",
    "dropout_of_stacks",
    "grouped_linear",
    "grouped_linear_reference",
    "weighted_scatter",
    "weighted_scatter_reference",
]
