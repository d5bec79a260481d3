"""Batch normalisation whose statistics do not depend on how a batch is spread over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_moe.parallel import added_over_ranks

MOMENTUM = 0.1
EPS = 1e-5


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
        mean_F, var_F = self._of_batch(wide_BF) if self.training else (self.running_mean, self.running_var)
        scale_F = self.weight * (var_F + EPS).rsqrt()
        return ((wide_BF - mean_F) * scale_F + self.bias).to(x_BF.dtype)

    def _of_batch(self, x_BF: Tensor) -> tuple[Tensor, Tensor]:
        sums = added_over_ranks(torch.cat([x_BF.sum(dim=0), x_BF.new_tensor([len(x_BF)])]))
        count = sums[-1].detach().clamp(min=1)
        mean_F = sums[:-1] / count
        var_F = added_over_ranks((x_BF - mean_F).square().sum(dim=0)) / count
        with torch.no_grad():
            unbiased_F = var_F * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean_F.to(self.running_mean), MOMENTUM)
            self.running_var.lerp_(unbiased_F.to(self.running_var), MOMENTUM)
        return mean_F, var_F
