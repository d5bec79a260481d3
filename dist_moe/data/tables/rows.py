"""Rows of a prepared table as arrays, and a rank's share of a step of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.batches import ExampleBatch


@dataclass(frozen=True)
class RowBatch(ExampleBatch):
    """One rank's share of a step: B rows with C categorical, M numeric and P list entries, and T targets.

    ``ids_BC``: int64. ``numeric_BM``: fp32. ``lists_BP``: int64, the lists side by side, filled up with -1.
    ``target_BT``: fp32, NaN where a row is not labelled. ``weight_B``: fp32, 1 without a column of weights.
    ``examples_in_step``: rows of the whole step over all ranks and micro-batches. ``weight_in_step_T``: for each
    target the weights of those among them that are labelled for it, added up.
    """

    ids_BC: Tensor
    numeric_BM: Tensor
    lists_BP: Tensor
    target_BT: Tensor
    weight_B: Tensor
    examples_in_step: int
    weight_in_step_T: tuple[float, ...]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of the model."""
        return self.ids_BC, self.numeric_BM, self.lists_BP


@dataclass(frozen=True)
class RowTable:
    """N rows as read-only memory maps, with C categorical, M numeric and P list entries, and T targets.

    ``ids_NC``, ``lists_NP``: int32. ``numeric_NM``, ``target_NT``, ``weight_N``: fp32; a target is NaN where the row is
    not labelled for it, a weight 1 if the table has none. ``group_N``: int64, the number of a row's group (such as its
    user), -1 where it has none.
    """

    ids_NC: NDArray[np.int32]
    numeric_NM: NDArray[np.float32]
    lists_NP: NDArray[np.int32]
    target_NT: NDArray[np.float32]
    weight_N: NDArray[np.float32]
    group_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.weight_N)

    def batch(self, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> RowBatch:
        """Return the rows ``index_B``, a share of a step that uses ``step_index`` over all ranks and micro-batches."""
        columns = (self.ids_NC, self.numeric_NM, self.lists_NP, self.target_NT, self.weight_N)
        ids, numeric, lists, target, weight = (torch.from_numpy(np.asarray(column[index_B])) for column in columns)
        labelled_ST = ~np.isnan(self.target_NT[step_index])
        weights = tuple((self.weight_N[step_index].astype(np.float64) @ labelled_ST).tolist())
        return RowBatch(ids.long(), numeric, lists.long(), target, weight, len(step_index), weights)
