"""Experts' matrices as a product of low rank plus a few whole rows: W = U V + S, as LoSparse stores them.

Li, Yu, Zhang, Liang, He, Chen, Zhao: LoSparse, ICML 2023; of merged experts: Li et al., Merge, Then Compress, ICLR
2024. A row of the papers' W (out, in) gives one number of the result. Banks multiply rows of tokens from the left,
x W^T = (x V^T) U^T + x S^T, so that what is a row there is a column of what is stored here.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from dist_moe import kernels
from dist_moe.config.settings import LARGEST_SIZE, Settings, Size


class LowRankConfig(Settings):
    """Matrices of experts as U V + S, of which S has some rows only."""

    rank: Size = Field(32, description="rank of U V")
    rows: tuple[dict[str, Annotated[int, Field(ge=0, le=LARGEST_SIZE)]], ...] | None = Field(
        None,
        description="rows of S of each matrix of an expert, by the matrix's name, for each mixture, as pruning leaves "
        "them; the most that an expert has (null: all)",
    )


class LowRankMatrix(NamedTuple):
    """A matrix of each of some experts, W^T = V^T U^T + S^T; fields are the ends of the names of a bank's tensors.

    ``into`` (E, in, rank): V^T. ``back`` (E, rank, out): U^T. ``sparse`` (E, in, Q): the rows of S that there are, as
    columns; ``row_ids`` (E, Q): which number of the result each of them gives; -1: none, a row that is padding or was
    pruned, whose gradient is exactly 0. Both None where there are no rows.
    """

    into: Tensor
    back: Tensor
    sparse: Tensor | None
    row_ids: Tensor | None

    def grouped(self, x_ND: Tensor, bias_EF: Tensor | None, rows_per_expert: kernels.RowCounts) -> Tensor:
        """Return (N, out) for (N, in) rows sorted by expert; N may be 0."""
        low_NP = kernels.grouped_linear(x_ND, self.into, None, rows_per_expert)
        y_NF = kernels.grouped_linear(low_NP, self.back, bias_EF, rows_per_expert)
        if self.sparse is None or self.row_ids is None:
            return y_NF
        sparse_NQ = kernels.grouped_linear(x_ND, self.sparse, None, rows_per_expert)
        return kernels.grouped_index_add(y_NF, sparse_NQ, self.row_ids, rows_per_expert)

    def batched(self, x_ETD: Tensor, bias_EF: Tensor | None) -> Tensor:
        """Return (E, T, out) for (E, T, in), by batched products."""
        y_ETF = batched_linear(x_ETD @ self.into, self.back, bias_EF)
        if self.sparse is None or self.row_ids is None:
            return y_ETF
        id_E1Q = self.row_ids.long().unsqueeze(1)
        sparse_ETQ = (x_ETD @ self.sparse).masked_fill(id_E1Q < 0, 0)
        return y_ETF.scatter_add(2, id_E1Q.clamp(min=0).expand(sparse_ETQ.shape), sparse_ETQ)


def batched_linear(x_ETD: Tensor, weight_EDF: Tensor, bias_EF: Tensor | None) -> Tensor:
    """Return (E, T, F): each expert's rows times its matrix, plus its bias if there is one."""
    return x_ETD @ weight_EDF if bias_EF is None else torch.baddbmm(bias_EF.unsqueeze(1), x_ETD, weight_EDF)
