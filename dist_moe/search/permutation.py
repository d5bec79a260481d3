"""Permutation local search: learn slot -> expert together with the model, then round it.

COMET (KDD 2023), section on local search; schedule and constants from the authors' code
(permutations of the mazumder-lab/COMET repository). For step t = 1, 2, ... of a stage of length T:

    P_soft = Sinkhorn_N(t)(R / tau(t))     rows first, columns last, in log space
    log10 tau(t) = -3 - 4 t/T,   N(t) = floor(20 + 130 t/T)
    t <  T: the layer mixes with P_soft, gradients flow to R
    t >= T: the layer relabels with P_hard = the assignment that maximises <P_soft, P>, for ever
    any evaluation relabels with P_hard of the last P_soft

Three options go beyond the paper: several matrices, rounding R instead of P_soft (sounder at the last
temperatures, where Sinkhorn is far from converged), and a hard forward pass while learning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.config.settings import LARGEST_EPOCHS, Settings
from dist_moe.gates import Gate
from dist_moe.routing import SlotMap, SoftPermutation, StraightThroughPermutation
from dist_moe.search.agreement import agree_on_tables
from dist_moe.search.sinkhorn import permutation_entropy, sinkhorn
from dist_moe.search.slot_table import SlotTable, give_branches_slots

INIT_RANGE = 0.05

Temperature = Annotated[float, Field(gt=0)]
Iterations = Annotated[int, Field(ge=1, le=100_000)]


class PermutationSearchConfig(Settings):
    """The paper's permutation search (the "+" of COMET+): Sinkhorn-relaxed, then rounded."""

    epochs: float = Field(
        0.1,
        gt=0,
        le=LARGEST_EPOCHS,
        description="length of the learning stage; while it lasts every token visits every expert, unless forward=hard",
    )
    entropy_weight: float = Field(1e-4, ge=0, description="weight of the entropy of the relaxed permutation")
    temperature: tuple[Temperature, Temperature] = Field(
        (1e-3, 1e-7), description="first and last temperature of the stage, interpolated in their logarithm"
    )
    iterations: tuple[Iterations, Iterations] = Field(
        (20, 150), description="first and last number of Sinkhorn iterations, interpolated"
    )
    per_gate: bool = Field(False, description="one permutation for each task's gate instead of a shared one")
    per_branch: bool = Field(False, description="one permutation for each tree or selector of a gate")
    rounding: Literal["soft", "relaxed"] = Field(
        "soft", description="what is rounded in the end: the soft permutation (the paper's code) or R itself"
    )
    forward: Literal["soft", "hard"] = Field(
        "soft",
        description="what a training step mixes with: the soft permutation (every token visits every expert), or "
        "the hard one with straight-through gradients (routing stays sparse)",
    )

    def build(self, gates: Sequence[Gate], steps_per_epoch: int) -> PermutationSearch:
        """Return the search for the ``gates`` of one layer, whose branches get slots of their own if need be.

        It permutes: the layer must have as many experts as a gate has slots, which the layer checks.
        """
        options = self.model_dump(exclude={"epochs", "per_branch"})
        search = PermutationSearch(
            gates[0].num_experts,
            max(1, round(self.epochs * steps_per_epoch)),
            len(gates),
            branches=gates[0].num_branches if self.per_branch else 1,
            **options,
        )
        give_branches_slots(gates, search)
        return search


class PermutationSearch(SlotTable):
    """Relaxed n x n permutations, one for all or one for each gate and branch.

    ``relaxed`` (P, K, n, n) is R, learned by the model's own optimiser. Buffers, all in the checkpoint:
    ``step`` counts training steps, ``soft`` is the last P_soft, ``table`` is P_hard as
    slot -> expert. Call :meth:`begin_step` once before each training step, and
    :meth:`begin_evaluation` before evaluating: these two are the places where ranks agree.
    """

    relaxed: nn.Parameter
    step: Tensor
    soft: Tensor

    def __init__(
        self,
        num_experts: int,
        stage_steps: int,
        num_gates: int = 1,
        *,
        entropy_weight: float = 1e-4,
        temperature: tuple[float, float] = (1e-3, 1e-7),
        iterations: tuple[int, int] = (20, 150),
        per_gate: bool = False,
        branches: int = 1,
        rounding: Literal["soft", "relaxed"] = "soft",
        forward: Literal["soft", "hard"] = "soft",
    ) -> None:
        super().__init__(num_experts, num_gates, per_gate=per_gate, branches=branches)
        self.stage_steps = stage_steps
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.iterations = iterations
        self.rounds_relaxed = rounding == "relaxed"
        self.straight_through = forward == "hard"
        matrices = (*self.table.shape, num_experts)
        self.relaxed = nn.Parameter(torch.empty(matrices).uniform_(-INIT_RANGE, INIT_RANGE))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("soft", torch.eye(num_experts).expand(matrices).clone())

    @property
    def learning(self) -> bool:
        """Whether the stage lasts, that is, whether training learns the permutation."""
        return int(self.step) < self.stage_steps

    def end_learning(self) -> None:
        """End the stage here, with the rounding of the last soft permutation."""
        self.begin_evaluation()
        self.step.fill_(max(int(self.step), self.stage_steps))

    @torch.no_grad()
    def begin_step(self) -> None:
        """Count a training step; the one that ends the stage rounds the permutation.

        A straight-through search rounds the permutation of every step of the stage.
        """
        self.step += 1
        if self.learning and self.straight_through:
            self.soft.copy_(self.soft_matrix())
            self.round()
        elif int(self.step) == self.stage_steps:
            self.round()

    def begin_evaluation(self) -> None:
        """During the stage, round the last soft permutation so that the evaluation uses it."""
        if 0 < int(self.step) < self.stage_steps:
            self.round()

    def round(self) -> None:
        """Set ``table`` to the rounded permutation, the same on all ranks."""
        self.table.copy_(agree_on_tables(self.relaxed.detach() if self.rounds_relaxed else self.soft))

    def forward(self) -> tuple[Sequence[SlotMap], dict[str, Tensor]]:
        """Return one slot map per gate, soft while training learns it, and the entropy term."""
        if not (self.training and self.learning):
            permutations, aux = super().forward()
            if self.training:
                # R stays in the graph with a zero gradient, so that no rank or ZeRO stage treats it as absent.
                aux["permutation"] = 0.0 * self.relaxed.sum()
            return permutations, aux
        with torch.autocast(self.relaxed.device.type, enabled=False):
            soft = self.soft_matrix()
            self.soft.copy_(soft.detach())
            aux = {"permutation": self.entropy_weight * permutation_entropy(soft)}
        if self.straight_through:
            maps = zip(soft, self.hard_maps(), strict=True)
            return self.for_gates([StraightThroughPermutation(*matrix_and_map) for matrix_and_map in maps]), aux
        return self.for_gates([SoftPermutation(matrix_KEE) for matrix_KEE in soft]), aux

    def current_matrix(self) -> Tensor:
        """Return (P, K, n, n), without gradient: the last soft matrices during the stage, then the hard ones.

        With ``forward: hard`` the soft ones are what is learnt, not what training routes by.
        """
        return self.soft if self.learning else super().current_matrix()

    def soft_matrix(self) -> Tensor:
        """Return P_soft of the current step, (P, K, n, n), in fp32 (fp64 if R is), but computed in fp64.

        Near a vertex its gradient is a difference of nearly equal numbers. In fp32 that is rounding
        noise, which Adam turns into steps of full size: two layouts of a run would part company.
        """
        temperature, iterations = self.schedule(int(self.step))
        soft = sinkhorn(self.relaxed.double() / temperature, iterations)
        return soft if self.relaxed.dtype == torch.float64 else soft.float()

    def schedule(self, count: int) -> tuple[float, int]:
        """Return temperature and number of Sinkhorn iterations of the ``count``-th training step."""
        progress = min(count / self.stage_steps, 1.0)
        log_first, log_last = (math.log10(t) for t in self.temperature)
        first, last = self.iterations
        return 10 ** (log_first + (log_last - log_first) * progress), math.floor(first + (last - first) * progress)
