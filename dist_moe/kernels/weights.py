"""The weights of stacked feed-forward networks, as the kernels for both kinds of device take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class FeedForwardWeights(NamedTuple):
    """``up`` (E, D, F), ``down`` (E, F, D'); optional ``gate`` (E, D, F), ``up_bias`` (E, F), ``down_bias`` (E, D')."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> FeedForwardWeights:
        """Apply ``function`` to every tensor that there is."""
        rest = (None if weight is None else function(weight) for weight in self[2:])
        return FeedForwardWeights(function(self.up), function(self.down), *rest)
