"""Batch normalisation of experts' results, each expert by the statistics of its own rows; Ioffe and Szegedy (2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dist_moe.kernels import TokenIndex, rows_of_tokens, sums_at

MOMENTUM = 0.1
EPS = 1e-5

Added = Callable[[Tensor], Tensor]
"""The sum of a tensor over all ranks, differentiable: a rank's gradient is the sum of those of the ranks' results."""


def alone(x: Tensor) -> Tensor:
    """Return ``x``: the sum over a single rank."""
    return x


def batch_statistics(
    x_NF: Tensor, group_N: Tensor, num_groups: int, added: Added = alone
) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (G, 1), mean (G, F) and biased variance (G, F) of the rows of every group, on all ranks.

    ``x_NF``: rows, fp32 at least; ``group_N``: the group of each in 0..``num_groups`` - 1; N may be 0. ``added``: adds
    up over the ranks. Differentiable by the rows. A group without rows has mean and variance 0.
    """
    index = TokenIndex.of(group_N, num_groups)
    sums = added(sums_at(torch.cat([x_NF, x_NF.new_ones(len(x_NF), 1)], dim=1), group_N, num_groups))
    count_G1 = sums[:, -1:].detach()
    mean_GF = sums[:, :-1] / count_G1.clamp(min=1)
    squares_NF = (x_NF - rows_of_tokens(mean_GF, index)).square()
    return count_G1, mean_GF, added(sums_at(squares_NF, group_N, num_groups)) / count_G1.clamp(min=1)


@torch.no_grad()
def follow_batch(
    running_mean_GF: Tensor, running_var_GF: Tensor, count_G1: Tensor, mean_GF: Tensor, var_GF: Tensor
) -> None:
    """Move running statistics towards those of a batch; a group without rows keeps its own."""
    unbiased_GF = var_GF * (count_G1 / (count_G1 - 1).clamp(min=1))
    step_G1 = MOMENTUM * (count_G1 > 0).to(running_mean_GF)
    running_mean_GF.lerp_(mean_GF.to(running_mean_GF), step_G1)
    running_var_GF.lerp_(unbiased_GF.to(running_var_GF), step_G1)


class ExpertBatchNorm(nn.Module):
    """``norm(x_NF, local_N, expert_ids, weight_EF, bias_EF)`` normalises each expert's rows over all that it has.

    Weights and biases, (E_local, F), are parameters of the bank that holds this rank's experts. ``running_mean``,
    ``running_var``: (E, F) over *all* experts by global id, the same on every rank whatever its experts, for
    evaluation. ``added``: adds up over the ranks, also over those that hold copies of an expert; see
    :meth:`~dist_moe.experts.ExpertBank.add_over_ranks`. Two collectives forward and two backward while training. With
    gradient accumulation, a batch is one micro-batch. Computes in fp32 at least.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_experts, num_features))
        self.register_buffer("running_var", torch.ones(num_experts, num_features))
        self.added: Added = alone

    def forward(
        self, x_NF: Tensor, local_N: Tensor, expert_ids: Sequence[int], weight_EF: Tensor, bias_EF: Tensor
    ) -> Tensor:
        """Return the normalised rows; ``local_N``: index of each one's expert in ``expert_ids``; N may be 0."""
        wide_NF = x_NF.to(torch.promote_types(x_NF.dtype, torch.float32))
        id_E = torch.tensor(expert_ids, device=x_NF.device)
        mean, var = self.running_mean, self.running_var
        if self.training:
            count, mean, var = batch_statistics(wide_NF, id_E[local_N], len(mean), self.added)
            follow_batch(self.running_mean, self.running_var, count, mean, var)
        scale_EF = weight_EF * (var[id_E] + EPS).rsqrt()
        of_expert = torch.stack([mean[id_E].to(scale_EF), scale_EF, bias_EF.to(scale_EF)], dim=1).flatten(1)
        of_row = rows_of_tokens(of_expert, TokenIndex.of(local_N, len(id_E)))
        mean_NF, scale_NF, bias_NF = of_row.chunk(3, dim=1)
        return ((wide_NF - mean_NF) * scale_NF + bias_NF).to(x_NF.dtype)
