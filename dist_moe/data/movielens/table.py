"""Tables and batches of (user, item) pairs with ratings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.batches import ExampleBatch


@dataclass(frozen=True)
class PairBatch(ExampleBatch):
    """One rank's share of a step. ``user_B``, ``item_B``: int64; ``rating_B``: fp32, 0 = not rated.

    ``examples_in_step``, ``rated_in_step``: sizes of the whole step over all ranks and micro-batches,
    by which sums are divided so that a loss does not depend on how the step is shared out.
    """

    user_B: Tensor
    item_B: Tensor
    rating_B: Tensor
    examples_in_step: int
    rated_in_step: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Arguments of the model."""
        return self.user_B, self.item_B


@dataclass(frozen=True)
class PairTable:
    """N (user, item) pairs in random order, as read-only memory maps.

    ``user_N, item_N`` are int32 indices; ``rating_N`` holds stars, or 0 for a pair that was not rated (a
    sampled negative): int8 where all stars are whole, fp32 where there are halves.
    """

    user_N: NDArray[np.int32]
    item_N: NDArray[np.int32]
    rating_N: NDArray[np.int8 | np.float32]

    def __len__(self) -> int:
        return len(self.rating_N)

    @property
    def watched(self) -> NDArray[np.bool_]:
        """True where the pair was rated; a new array of shape [N]."""
        return np.asarray(self.rating_N) > 0

    def batch(self, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> PairBatch:
        """Return the pairs ``index_B``, a share of a step that uses ``step_index`` over all ranks and micro-batches."""
        columns = (self.user_N[index_B], self.item_N[index_B], self.rating_N[index_B])
        user_B, item_B, rating_B = (torch.from_numpy(np.asarray(column)) for column in columns)
        rated = int((self.rating_N[step_index] > 0).sum())
        return PairBatch(user_B.long(), item_B.long(), rating_B.float(), len(step_index), rated)
