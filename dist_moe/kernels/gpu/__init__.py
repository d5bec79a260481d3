"""The kernels of the path for accelerators: the host never waits for what only the device knows.

Nothing here imports Triton before a kernel runs: builds of torch for CPUs come without it.
"""

from dist_moe.kernels.gpu.networks import feed_forward, grouped_linear
from dist_moe.kernels.gpu.rows import rows_of_tokens, weighted_scatter

__all__ = ["feed_forward", "grouped_linear", "rows_of_tokens", "weighted_scatter"]
