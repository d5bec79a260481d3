"""DHKD: a second head learns the teacher's logits, class by class, while the first learns the labels.

Yang et al.: Dual-Head Knowledge Distillation (KDD 2025). With temperature T, student logits s and teacher logits t,

    BinaryKL        T^2 sum over classes of KL(sigmoid(t / T) || sigmoid(s / T)), as distributions of two outcomes
    BinaryKL-Norm   T^2 sum over classes of KL(1/2 || sigmoid((s - t) / T))
                    = T^2 sum over classes of log cosh((s - t) / 2T)

per example. Unlike a softmax, they tell logits apart that differ by a constant. The labels' cross-entropy and
BinaryKL-Norm agree on the backbone and contradict each other in one linear classifier, hence the two heads: see
:mod:`dist_moe.models.dual_head`; the auxiliary one is discarded after training. What remains of the
contradiction :mod:`dist_moe.engine.deepspeed.gradient_alignment` takes out.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_moe.config.settings import Settings
from dist_moe.tasks.objective import at_least_fp32


class HasAuxiliaryLogits(Protocol):
    """Output of a student: ``auxiliary_BC``, (B, C) logits of the auxiliary head while it trains."""

    @property
    def auxiliary_BC(self) -> Tensor | None:
        """Logits of the auxiliary head while it trains."""


class HasPredictions(Protocol):
    """Output of a teacher: ``predictions``, the first of them (B, C) logits."""

    @property
    def predictions(self) -> tuple[Tensor, ...]:
        """(B, C) logits, the first of them."""


class DHKDConfig(Settings):
    """Dual-head distillation: the labels' loss keeps its task weight, gamma."""

    weight: float = Field(1.0, ge=0, description="alpha: weight of the auxiliary head's loss (ImageNet: 0.1)")
    temperature: float = Field(2.0, gt=0, description="T, by which differences of logits are divided")
    align_gradients: bool = Field(
        False,
        description="take out of the teacher's gradient what contradicts the labels' (ZeRO stages 0 to 2)",
    )

    def terms(self, student: HasAuxiliaryLogits, teacher: HasPredictions, batch: Any) -> dict[str, Tensor]:
        """``auxiliary``, weighted, as :class:`DistillationObjective` wants it.

        Raises ValueError for a student without auxiliary head, or that does not train.
        """
        if student.auxiliary_BC is None:
            raise ValueError("the student gives no auxiliary logits: it has no auxiliary head, or is not training")
        return {"auxiliary": self.loss(student.auxiliary_BC, teacher.predictions[0], batch.examples_in_step)}

    def loss(self, auxiliary_BC: Tensor, teacher_BC: Tensor, examples_in_step: int) -> Tensor:
        """The weighted loss of the auxiliary head's logits; see :func:`binary_kl_norm`."""
        return self.weight * binary_kl_norm(auxiliary_BC, teacher_BC, self.temperature, examples_in_step)


def binary_kl(student_BC: Tensor, teacher_BC: Tensor, temperature: float, examples_in_step: int) -> Tensor:
    """BinaryKL of (B, C) logits, a sum over the batch divided by the step's examples; 0-dim, at least fp32.

    Its gradient is T (sigmoid(s / T) - sigmoid(t / T)) for each example and class.
    """
    s, t = (at_least_fp32(logits) / temperature for logits in (student_BC, teacher_BC))
    yes = t.sigmoid() * (F.softplus(-s) - F.softplus(-t))
    no = (-t).sigmoid() * (F.softplus(s) - F.softplus(t))
    return temperature**2 * (yes + no).sum() / examples_in_step


def binary_kl_norm(student_BC: Tensor, teacher_BC: Tensor, temperature: float, examples_in_step: int) -> Tensor:
    """BinaryKL-Norm of (B, C) logits, a sum over the batch divided by the step's examples; 0-dim, at least fp32.

    Symmetric; zero for equal logits only; about (s - t)^2 / 8 for small differences, whatever T; linear for large
    ones. Its gradient is T/2 tanh((s - t) / 2T) for each example and class.
    """
    difference_BC = at_least_fp32(student_BC) - at_least_fp32(teacher_BC)
    return temperature**2 * log_cosh(difference_BC / (2 * temperature)).sum() / examples_in_step


def log_cosh(x: Tensor) -> Tensor:
    """log((e^x + e^-x) / 2), without overflow for large and without cancellation for small ``x``; gradient tanh(x)."""
    size = x.abs()
    small = 0.5 * x.clamp(-1, 1).sinh().square().log1p()  # cosh^2 = 1 + sinh^2
    return torch.where(size < 1, small, size + F.softplus(-2 * size) - math.log(2))
