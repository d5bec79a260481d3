"""Fast paths, each with a plain reference beside it."""

from dist_moe.kernels.activations import ACTIVATIONS
from dist_moe.kernels.device_path import RowCounts, counts_on_host, on_device_path
from dist_moe.kernels.dropout import dropout, dropout_of_stacks
from dist_moe.kernels.feed_forward import FeedForwardWeights, feed_forward, feed_forward_reference
from dist_moe.kernels.gather_rows import gather_rows, gather_rows_reference
from dist_moe.kernels.grouped_linear import grouped_linear, grouped_linear_reference
from dist_moe.kernels.weighted_scatter import weighted_scatter, weighted_scatter_reference

__all__ = [
    "ACTIVATIONS",
    "FeedForwardWeights",
    "RowCounts",
    "counts_on_host",
    "dropout",
    "dropout_of_stacks",
    "feed_forward",
    "feed_forward_reference",
    "gather_rows",
    "gather_rows_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "on_device_path",
    "weighted_scatter",
    "weighted_scatter_reference",
]
