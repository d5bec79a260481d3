"""The kernels of the path for accelerators: the host never waits for what only the device knows.

Nothing here imports Triton before a kernel runs: builds of torch for CPUs come without it.
"""

from dist_moe.kernels.gpu.networks import FeedForward, GroupedLinear
from dist_moe.kernels.gpu.rows import WeightedScatter, rows_of_tokens

__all__ = ["FeedForward", "GroupedLinear", "WeightedScatter", "rows_of_tokens"]
