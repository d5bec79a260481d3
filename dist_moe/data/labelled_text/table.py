"""Examples as a model takes them: rows of token ids, padded to the longest of their batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.batches import TensorBatch


@dataclass(frozen=True)
class LabelledBatch(TensorBatch):
    """One rank's share of a step.

    ``token_BS``: int64 [B, S], S the longest row's tokens, shorter rows filled up. ``length_B``: int64 [B], the
    tokens of each row. ``type_BS``: int64 [B, S], 0 for the first text of a pair and 1 for the second; None where
    an example is one text. ``label_B``: int64 [B] class numbers, fp32 [B] numbers to be predicted, or int64 [B, 2] the
    first and the last token of an answer.
    ``examples_in_step``, ``tokens_in_step``: the size of the whole step over all ranks and micro-batches, without
    what rows are filled up with.
    """

    token_BS: Tensor
    length_B: Tensor
    type_BS: Tensor | None
    label_B: Tensor
    examples_in_step: int
    tokens_in_step: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of the model."""
        lengths = (self.token_BS, self.length_B)
        return lengths if self.type_BS is None else (*lengths, self.type_BS)


@dataclass(frozen=True)
class LabelledTable:
    """N tokenised examples, as read-only memory maps; see `TokenisedTexts` for ``token_M, start_P, first_N``.

    ``target_N``: int64 class numbers, fp32, or int64 [N, 2]. ``padding``: the id that rows are filled up with.
    ``has_pairs``: an example is two texts.
    """

    token_M: NDArray[np.int32]
    start_P: NDArray[np.int64]
    first_N: NDArray[np.int32]
    target_N: NDArray[Any]
    padding: int
    has_pairs: bool

    def __len__(self) -> int:
        return len(self.target_N)

    @property
    def length_N(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.start_P)

    def batch(self, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> LabelledBatch:
        """Return the examples ``index_B`` of a step that uses ``step_index`` over all ranks and micro-batches."""
        start_B, length_B = self.start_P[index_B], self._lengths(index_B)
        position_S = np.arange(length_B.max(initial=1))
        real_BS = position_S < length_B[:, None]
        token_BS = np.full(real_BS.shape, self.padding, dtype=np.int64)
        token_BS[real_BS] = self.token_M[(start_B[:, None] + position_S)[real_BS]]
        return LabelledBatch(
            torch.from_numpy(token_BS),
            torch.from_numpy(length_B),
            torch.from_numpy(self._types(index_B, position_S, real_BS)) if self.has_pairs else None,
            torch.from_numpy(np.array(self.target_N[index_B])),
            len(step_index),
            int(self._lengths(step_index).sum()),
        )

    def _lengths(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray(self.start_P[index_B + 1] - self.start_P[index_B])

    def _types(
        self, index_B: NDArray[np.int64], position_S: NDArray[np.int64], real_BS: NDArray[np.bool_]
    ) -> NDArray[np.int64]:
        return ((position_S >= self.first_N[index_B][:, None]) & real_BS).astype(np.int64)
