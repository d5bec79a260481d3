"""Fast paths, each with a plain reference beside it."""

from dist_moe.kernels.grouped_linear import grouped_linear, grouped_linear_reference

__all__ = ["grouped_linear", "grouped_linear_reference"]
