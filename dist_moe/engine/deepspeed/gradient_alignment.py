"""Alignment of the gradients of two losses: the part of the second that contradicts the first is taken out.

Yang et al.: Dual-Head Knowledge Distillation (KDD 2025), as projecting conflicting gradients (Yu et al., NeurIPS
2020) for two losses of which one leads. With g_1, g_2 the gradients of the whole step over all parameters,
flattened:

    g = g_1 + g_2                                            where <g_2, g_1> >= 0
    g = g_1 + g_2 - <g_2, g_1> / |g_1|^2 g_1                 else; <g, g_1> is |g_1|^2 then

Gradients are summed over micro-batches and ranks first, dense ones over all ranks and experts over the ranks that
hold copies of them, and inner products count every parameter once: projected on each rank for itself, or with
replicated parameters counted once per rank, the result would depend on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.engine.deepspeed.engine import ExpertParallelEngine, is_expert_parameter
from dist_moe.errors import UserError

STAGES = (0, 1, 2)
"""ZeRO stages at which a parameter is whole on its rank."""


def check_alignment(stage: int) -> None:
    """Raise UserError unless gradients can be aligned at this ZeRO stage; needs no process group."""
    if stage not in STAGES:
        raise UserError(
            f"deepspeed.zero_optimization.stage={stage}: aligning gradients needs whole parameters and gradients, of "
            f"which every rank has a slice only; choose 0, 1 or 2, or train without gradient alignment"
        )


class GradientAlignment:
    """``alignment(leading, following)`` -> the loss to give to ``engine.backward``, for every micro-batch of a step.

    The losses are this rank's for the micro-batch, scaled as the engine wants any loss: their mean over ranks and
    micro-batches is the step's. The engine then steps by the merged gradient, at any layout; what it got from the
    micro-batches before the last is zero. A collective over all ranks in the last one. Both losses come from the
    same forward pass, which is gone through backwards twice: what it keeps lives until the second time, and two
    fp32 copies of this rank's gradients live until the last micro-batch.

    ``cosine``: of the two gradients of the last step, 0-dim; 0 before the first, and where one of them is zero.
    ``num_ranks``: of the job.

    Raises UserError at ZeRO stage 3.
    """

    def __init__(self, engine: ExpertParallelEngine) -> None:
        check_alignment(engine.zero_optimization_stage())
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._parts = [
            _Part([p for p in trained if not is_expert_parameter(p)], engine, spread_over=1),
            _Part([p for p in trained if is_expert_parameter(p)], engine, engine.process_groups.expert_parallel_size),
        ]
        self._world = engine.process_groups.world
        self.num_ranks = engine.process_groups.environment.world_size
        self._micro_batches = engine.gradient_accumulation_steps()
        self._done = 0
        self.cosine = torch.zeros((), device=engine.device)

    @property
    def is_last(self) -> bool:
        """Whether the latest micro-batch has ended a step."""
        return self._done == 0

    def __call__(self, leading: Tensor, following: Tensor) -> Tensor:
        parameters = [parameter for part in self._parts for parameter in part.parameters]
        gradients = [_gradients(leading, parameters, keep=True), _gradients(following, parameters, keep=False)]
        dense = len(self._parts[0].parameters)
        for part, columns in zip(self._parts, (slice(None, dense), slice(dense, None)), strict=True):
            part.add([of_loss[columns] for of_loss in gradients])
        self._done = (self._done + 1) % self._micro_batches
        handed = self._merged() if self.is_last else [torch.zeros_like(p) for p in parameters]
        return _Handed.apply((leading + following).detach(), handed, *parameters)

    def _merged(self) -> list[Tensor]:
        dense, experts = [part.reduce() for part in self._parts]
        # Dense gradients are the same on all ranks after reduce(), experts' on the ranks that share them: a sum over
        # the expert-parallel group counts every expert once.
        products_3 = dense + self._world.sum(experts)
        inner, square, other = products_3.unbind()
        self.cosine = (inner / (square * other).sqrt().clamp(min=torch.finfo(square.dtype).tiny)).to(self.cosine)
        share = torch.where(inner < 0, inner / square, 0)  # not where a product is nan: what is finite stays so
        return [gradient for part in self._parts for gradient in part.hand_over(share, self._micro_batches)]


class _Part:
    """A rank's dense parameters, or its experts, and the two gradients of each: (2, numbers) in fp32.

    ``spread_over``: ranks that hold different ones of them. The engine adds up what those ranks give that share
    some, and divides by the number of all ranks.
    """

    def __init__(self, parameters: list[nn.Parameter], engine: ExpertParallelEngine, spread_over: int) -> None:
        self.parameters = parameters
        self._spread_over = spread_over
        self._group = engine.group_of(parameters[0]) if parameters else None
        self._ranks = engine.process_groups.environment.world_size
        self._micro_batches = engine.gradient_accumulation_steps()
        self._device = engine.device
        self._sums_2N: Tensor | None = None

    def add(self, gradients: list[Sequence[Tensor]]) -> None:
        """Add the two gradients of a micro-batch."""
        rows = [torch.cat([g.float().flatten() for g in of_loss]) for of_loss in gradients if of_loss]
        now_2N = torch.stack(rows) if rows else torch.zeros(2, 0, device=self._device)
        self._sums_2N = now_2N if self._sums_2N is None else self._sums_2N + now_2N

    def reduce(self) -> Tensor:
        """Average over ranks and micro-batches, as the engine does: sum over those who share, divided by all.

        Returns (3,) fp64: <g_2, g_1>, |g_1|^2, |g_2|^2.
        """
        assert self._sums_2N is not None
        if self._group is not None and dist.get_world_size(self._group) > 1:
            dist.all_reduce(self._sums_2N, group=self._group)
        self._sums_2N /= self._ranks * self._micro_batches
        first_N, second_N = self._sums_2N.double()
        return torch.stack([second_N @ first_N, first_N @ first_N, second_N @ second_N])

    def hand_over(self, share: Tensor, micro_batches: int) -> list[Tensor]:
        """Return the merged gradients, multiplied by what the engine divides them by; forget the sums.

        Every rank hands the same g for a parameter, in the last micro-batch only. The engine divides a loss by the
        number of micro-batches, sums over the R / S ranks that share the parameter (S = ``spread_over``: 1 for dense
        ones, EP for experts) and divides by R: g arrives as g (R / S) / (micro_batches R).
        """
        assert self._sums_2N is not None
        first_N, second_N = self._sums_2N
        self._sums_2N = None
        merged_N = (second_N + first_N * (1 - share).to(first_N.dtype)) * (micro_batches * self._spread_over)
        pieces = merged_N.split([parameter.numel() for parameter in self.parameters])
        return [piece.view_as(p).to(p.dtype) for piece, p in zip(pieces, self.parameters, strict=True)]


class _Handed(torch.autograd.Function):
    """A function that returns ``value`` like a loss with the gradients that are handed over.

    DeepSpeed (0.19.8) reduces gradients in hooks of the backward pass of the loss that ``engine.backward`` gets, at
    ZeRO stages 1 and 2 bucket by bucket: what is written to ``parameter.grad`` itself, it never sees. The other
    micro-batches hand zeros, so that the same hooks run in every backward pass.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """Return ``value``; remember the gradients."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, scaled by that of ``value``."""
        return None, None, *(gradient * grad.to(gradient.dtype) for gradient in ctx.gradients)


def _gradients(loss: Tensor, parameters: list[nn.Parameter], *, keep: bool) -> list[Tensor]:
    """Return one gradient for each parameter, zero where the loss does not reach it.

    ``keep``: the graph is still needed.
    """
    if not loss.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
