"""SMoE-Dropout: a frozen random router, and a number of experts that grows while training.

Chen, Zhang, Jaiswal, Liu, Wang: Sparse MoE as the New Dropout (ICLR 2023). The router l = W x + b is
drawn once and never trained; a token's weights are the softmax over its k largest logits. From step
0 to step T, k goes from k_min to k_max (or back), by one of

    linear        k_min + round((k_max - k_min) t / T)
    cosine        k_max - round((k_max - k_min) cos(pi t / 2T))
    exponential   k_max - round((k_max - k_min) 0.99^floor(300 t / T))
    multi_step    k_min, 2 k_min, 4 k_min, ..., k_max, each for an equal share of T

"Dropout" is the paper's word: for given tokens nothing is random but the router's draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.gates.base import GATES, Gate, GateContext, GateSettings, Mixture, affine, check_k
from dist_moe.gates.top_k import largest

ROUTER_INIT_STD = 0.02
Schedule = Literal["linear", "cosine", "exponential", "multi_step"]


@GATES.register
class SMoEDropoutConfig(GateSettings):
    """The SMoE-Dropout gate: a frozen random router whose k follows a schedule."""

    evaluation_fields: ClassVar[tuple[str, ...]] = ("evaluation_k",)

    name: Literal["smoe_dropout"] = "smoe_dropout"
    k_min: int = Field(1, ge=1, description="experts per token at one end of the schedule")
    k_max: int | None = Field(None, ge=1, description="experts per token at the other end (null: all experts)")
    schedule: Schedule = Field("linear", description="how k goes from one end to the other")
    schedule_steps: int | None = Field(None, ge=1, description="length of the schedule in steps (null: the whole run)")
    increasing: bool = Field(True, description="from k_min to k_max; false: from k_max to k_min")
    evaluation_k: int | None = Field(
        None, ge=1, description="experts per token in evaluation (null: those of the schedule)"
    )

    def build(self, dim: int, num_experts: int, context: GateContext) -> SMoEDropout:
        """Return the gate. Raises ValueError if neither it nor the run has a number of steps."""
        steps = self.schedule_steps or context.total_steps
        if steps is None:
            raise ValueError("gate.schedule_steps=null means the run's steps, but the run has no fixed number of steps")
        options = self.model_dump(include={"increasing", "evaluation_k"})
        return SMoEDropout(dim, num_experts, self.k_min, self.k_max or num_experts, steps, self.schedule, **options)

    def validation_errors(self, num_experts: int) -> Iterator[str]:
        """Yield each bound of k that does not fit, and bounds in the wrong order."""
        for field in ("k_min", "k_max", "evaluation_k"):
            k = getattr(self, field)
            if k is not None and k > num_experts:
                yield f"{field}={k} exceeds num_experts={num_experts}; allowed: 1..{num_experts}"
        if self.k_max is not None and self.k_min > self.k_max:
            yield f"k_min={self.k_min} exceeds k_max={self.k_max}"


class SMoEDropout(Gate):
    """``weight`` (n, dim), N(0, 0.02), and ``bias`` (n,), zero: buffers, so that nothing can train them.

    ``step``: int64 buffer, the training step last begun: a loaded checkpoint evaluates with its own k.
    ``evaluation_k``: the k of evaluation, if it is not the schedule's.
    """

    can_exclude = True
    weight: Tensor
    bias: Tensor
    step: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k_min: int,
        k_max: int,
        schedule_steps: int,
        schedule: Schedule = "linear",
        *,
        increasing: bool = True,
        evaluation_k: int | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        for k in (k_min, k_max) if evaluation_k is None else (k_min, k_max, evaluation_k):
            check_k(k, num_experts)
        if k_min > k_max:
            raise ValueError(f"k_min must not exceed k_max, got {k_min} and {k_max}")
        if schedule_steps < 1:
            raise ValueError(f"schedule_steps must be at least 1, got {schedule_steps}")
        self.k_min = k_min
        self.k_max = k_max
        self.schedule_steps = schedule_steps
        self.schedule = schedule
        self.increasing = increasing
        self.evaluation_k = evaluation_k
        self.register_buffer("weight", nn.init.normal_(torch.empty(num_experts, dim), std=ROUTER_INIT_STD))
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def begin_step(self, step: int) -> None:
        """Remember the step, which decides k."""
        self.step.fill_(step)

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Mixture:
        """Return the softmax over the k largest logits."""
        own_k = None if self.training else self.evaluation_k
        logit_TE = self.logits(x_TD)
        slot_TK = largest(logit_TE, self.k_at(int(self.step)) if own_k is None else own_k)
        weight_TE = torch.zeros_like(logit_TE).scatter(1, slot_TK, logit_TE.gather(1, slot_TK).softmax(dim=-1))
        return Mixture(weight_TE.unsqueeze(1))

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the (T, n) logits, -inf for excluded slots."""
        return self.exclude(affine(x_TD, self.weight, self.bias))

    @property
    def rows_ED(self) -> Tensor | None:
        """The router's (n, dim) rows."""
        return self.weight

    def k_at(self, step: int) -> int:
        """Return k of training step ``step``; from ``schedule_steps`` on, that of the end."""
        step, steps, span = min(max(step, 0), self.schedule_steps), self.schedule_steps, self.k_max - self.k_min
        if self.schedule == "multi_step":
            stages = [self.k_min]
            while stages[-1] < self.k_max:
                stages.append(min(2 * stages[-1], self.k_max))
            stage = min(len(stages) * step // steps, len(stages) - 1)
            return stages[stage] if self.increasing else stages[-1 - stage]
        if self.schedule == "linear":  # round() takes halves to even, as the authors' code
            moved = round(span * step / steps)
        elif self.schedule == "cosine":
            moved = span - round(span * math.cos(math.pi * step / (2 * steps)))
        else:
            moved = span - round(span * 0.99 ** (300 * step // steps))
        return self.k_min + moved if self.increasing else self.k_max - moved
