"""Batch normalisation whose statistics do not depend on how a batch is spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_moe.experts.batch_norm import EPS, batch_statistics, follow_batch
from dist_moe.parallel import added_over_ranks


class BatchNormOverRanks(nn.Module):
    """``norm(x_BF)`` normalises each of F features over the examples of all ranks; Ioffe and Szegedy (2015).

    As torch's ``BatchNorm1d`` of the whole batch, gradients too; torch's own of several ranks needs a GPU. Two
    collectives forward and two backward while training, with several ranks; a rank may have no examples. With gradient
    accumulation, a batch is one micro-batch. Computes in fp32 at least.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x_BF: Tensor) -> Tensor:
        """Return the normalised (B, F) features of this rank's examples; B may be 0."""
        wide_BF = x_BF.to(torch.promote_types(x_BF.dtype, torch.float32))
        mean_1F, var_1F = self.running_mean.unsqueeze(0), self.running_var.unsqueeze(0)
        if self.training:
            running, group_B = (mean_1F, var_1F), torch.zeros(len(x_BF), dtype=torch.int64, device=x_BF.device)
            count_11, mean_1F, var_1F = batch_statistics(wide_BF, group_B, 1, added_over_ranks)
            follow_batch(*running, count_11, mean_1F, var_1F)
        return ((wide_BF - mean_1F) * (self.weight * (var_1F + EPS).rsqrt()) + self.bias).to(x_BF.dtype)
