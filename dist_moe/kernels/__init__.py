"""Fast paths, each with a plain reference beside it."""

from dist_moe.kernels.dropout import dropout
from dist_moe.kernels.feed_forward import feed_forward, feed_forward_reference
from dist_moe.kernels.grouped import (
    group_of_each_row,
    grouped_index_add,
    grouped_layer_norm,
    grouped_layer_norm_reference,
    grouped_linear,
    grouped_linear_reference,
)
from dist_moe.kernels.operands import (
    ACTIVATIONS,
    FeedForwardWeights,
    RowCounts,
    TokenIndex,
    counts_on_host,
    on_device_path,
    stable_order,
)
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
from dist_moe.kernels.token_rows import (
    rows_of_tokens,
    rows_of_tokens_reference,
    sums_at,
    weighted_scatter,
    weighted_scatter_reference,
)

__all__ = [
    "ACTIVATIONS",
    "DENSE_GAIN",
    "Band",
    "FeedForwardWeights",
    "Pairs",
    "RowCounts",
    "TokenIndex",
    "counts_on_host",
    "dense_products",
    "dropout",
    "feed_forward",
    "feed_forward_reference",
    "group_of_each_row",
    "grouped_index_add",
    "grouped_layer_norm",
    "grouped_layer_norm_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "on_device_path",
    "products_of_band",
    "rows_of_tokens",
    "rows_of_tokens_reference",
    "select",
    "sparse_products",
    "sparse_products_reference",
    "stable_order",
    "sums_at",
    "weighted_scatter",
    "weighted_scatter_reference",
]
