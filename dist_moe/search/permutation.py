"""Permutation local search: learn slot -> expert together with the model, then round it.

COMET (KDD 2023), section on local search; schedule and constants from the authors' code
(permutations of the mazumder-lab/COMET repository). For step t = 1, 2, ... of a stage of length T:

    P_soft = Sinkhorn_N(t)(R / tau(t))     rows first, columns last, in log space
    log10 tau(t) = -3 - 4 t/T,   N(t) = floor(20 + 130 t/T)
    t <  T: the layer mixes with P_soft, gradients flow to R
    t >= T: the layer relabels with P_hard = the assignment that maximises <P_soft, P>, for ever
    any evaluation relabels with P_hard of the last P_soft
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.routing import HardPermutation, Permutation, SoftPermutation
from dist_moe.search.agreement import agree_on_table
from dist_moe.settings import Settings

INIT_RANGE = 0.05
ENTROPY_EPSILON = 1e-6

Temperature = Annotated[float, Field(gt=0)]
Iterations = Annotated[int, Field(ge=1)]


class PermutationSearchConfig(Settings):
    """The paper's permutation search (the "+" of COMET+): Sinkhorn-relaxed, then rounded."""

    epochs: float = Field(
        0.1, gt=0, description="length of the learning stage; while it lasts every token visits every expert"
    )
    entropy_weight: float = Field(1e-4, ge=0, description="weight of the entropy of the relaxed permutation")
    temperature: tuple[Temperature, Temperature] = Field(
        (1e-3, 1e-7), description="first and last temperature of the stage, interpolated in their logarithm"
    )
    iterations: tuple[Iterations, Iterations] = Field(
        (20, 150), description="first and last number of Sinkhorn iterations, interpolated"
    )

    def build(self, num_experts: int, steps_per_epoch: int) -> PermutationSearch:
        stage_steps = max(1, round(self.epochs * steps_per_epoch))
        return PermutationSearch(num_experts, stage_steps, self.entropy_weight, self.temperature, self.iterations)


class PermutationSearch(nn.Module):
    """One relaxed n x n permutation, shared by all trees and all gates of a layer.

    ``relaxed`` (n, n) is R, learned by the model's own optimiser. Buffers, all in the checkpoint:
    ``step`` counts training steps, ``soft`` is the last P_soft, ``table`` is P_hard as
    slot -> expert. Call :meth:`begin_step` once before each training step, and
    :meth:`begin_evaluation` before evaluating: these two are the places where ranks agree.
    """

    relaxed: nn.Parameter
    step: Tensor
    soft: Tensor
    table: Tensor

    def __init__(
        self,
        num_experts: int,
        stage_steps: int,
        entropy_weight: float = 1e-4,
        temperature: tuple[float, float] = (1e-3, 1e-7),
        iterations: tuple[int, int] = (20, 150),
    ) -> None:
        super().__init__()
        self.stage_steps = stage_steps
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.iterations = iterations
        self.relaxed = nn.Parameter(torch.empty(num_experts, num_experts).uniform_(-INIT_RANGE, INIT_RANGE))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("soft", torch.eye(num_experts))
        self.register_buffer("table", torch.arange(num_experts))

    @property
    def learning(self) -> bool:
        """Whether the stage lasts, that is, whether training mixes with the soft permutation."""
        return int(self.step) < self.stage_steps

    def begin_step(self) -> None:
        """Count a training step; the one that ends the stage rounds the permutation."""
        self.step += 1
        if int(self.step) == self.stage_steps:
            self.table.copy_(agree_on_table(self.soft))

    def begin_evaluation(self) -> None:
        """During the stage, round the last soft permutation so that the evaluation uses it."""
        if 0 < int(self.step) < self.stage_steps:
            self.table.copy_(agree_on_table(self.soft))

    def forward(self) -> tuple[Permutation, dict[str, Tensor]]:
        if not self.training:
            return HardPermutation(self.table), {}
        if not self.learning:
            # R stays in the graph with a zero gradient, lest ranks or ZeRO stages treat it as absent.
            return HardPermutation(self.table), {"permutation": 0.0 * self.relaxed.sum()}
        with torch.autocast(self.relaxed.device.type, enabled=False):
            soft = self.soft_matrix()
            self.soft.copy_(soft.detach())
            return SoftPermutation(soft), {"permutation": self.entropy_weight * permutation_entropy(soft)}

    def current_matrix(self) -> Tensor:
        """(n, n), without gradient: the last soft matrix during the stage, then the hard one."""
        if self.learning:
            return self.soft
        return torch.eye(len(self.table), device=self.table.device)[self.table]

    def soft_matrix(self) -> Tensor:
        """P_soft of the current step, (n, n), in fp32 (fp64 if R is), but computed in fp64.

        Near a vertex its gradient is a difference of nearly equal numbers. In fp32 that is rounding
        noise, which Adam turns into steps of full size: two layouts of a run would part company.
        """
        progress = min(int(self.step) / self.stage_steps, 1.0)
        log_first, log_last = (math.log10(t) for t in self.temperature)
        temperature = 10 ** (log_first + (log_last - log_first) * progress)
        first, last = self.iterations
        soft = sinkhorn(self.relaxed.double() / temperature, math.floor(first + (last - first) * progress))
        return soft if self.relaxed.dtype == torch.float64 else soft.float()


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Normalise rows, then columns, ``iterations`` times, in log space; exp of the result."""
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
        logits = logits - logits.logsumexp(dim=-2, keepdim=True)
    return logits.exp()


def permutation_entropy(soft: Tensor) -> Tensor:
    """sum of -P log(P + 1e-6) over P and over P with its rows normalised (Sinkhorn ends on columns)."""
    rows = soft / soft.sum(dim=-1, keepdim=True)
    return sum((-(p * (p + ENTROPY_EPSILON).log()).sum() for p in (soft, rows)), soft.new_zeros(()))
