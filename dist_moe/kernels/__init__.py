"""Fast paths, each with a plain reference beside it."""

from dist_moe.kernels.dropout import dropout, dropout_of_stacks
from dist_moe.kernels.grouped_linear import grouped_linear, grouped_linear_reference
from dist_moe.kernels.sparse_products import (
    DENSE_GAIN,
    Band,
    Pairs,
    dense_products,
    products_of_band,
    select,
    sparse_products,
    sparse_products_reference,
)
from dist_moe.kernels.weighted_scatter import weighted_scatter, weighted_scatter_reference

__all__ = [
    "DENSE_GAIN",
    "Band",
    "Pairs",
    "dense_products",
    "dropout",
    "dropout_of_stacks",
    "grouped_linear",
    "grouped_linear_reference",
    "products_of_band",
    "select",
    "sparse_products",
    "sparse_products_reference",
    "weighted_scatter",
    "weighted_scatter_reference",
]
