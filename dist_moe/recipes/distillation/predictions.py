"""Distillation of any task's predictions: each of the student's follows the teacher's by what it means.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015). With temperature T, teacher logits t and
student logits s,

    classes   T^2 KL(softmax(t / T) || softmax(s / T))
    binary    T^2 KL(sigmoid(t / T) || sigmoid(s / T)), as distributions of two outcomes
    number    (t - s)^2

each a mean over an example's positions (tokens of a text, of which most tasks have one), then over the examples of the
whole step: sums are divided by counts of the step, so that ranks and micro-batches add up to it, whatever the layout.
The factor T^2 keeps gradients as large whatever T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_moe.config.settings import Settings
from dist_moe.recipes.distillation.dhkd import binary_kl
from dist_moe.recipes.distillation.moebert import hidden_mse, prediction_mse
from dist_moe.recipes.distillation.objective import Terms
from dist_moe.tasks.objective import at_least_fp32
from dist_moe.tasks.task import PredictionKind


class FollowConfig(Settings):
    """How a student follows its teacher's predictions."""

    weight: float = Field(0.2, ge=0, description="weight of following the teacher's predictions")
    temperature: float = Field(2.0, gt=0, description="T, by which logits are divided; the divergence is times T^2")
    hidden_weight: float = Field(
        0.0,
        ge=0,
        description="weight of the mean squared difference of hidden states, summed over layers; for models that give "
        "them: transformers and BERTs",
    )

    @property
    def ask(self) -> dict[str, bool]:
        """Keyword arguments for both models beside the batch's inputs."""
        return {"hidden_states": True} if self.hidden_weight else {}

    def terms(self, kinds: Sequence[PredictionKind], target_weights: dict[str, float]) -> Terms:
        """Return the losses, weighted: ``teacher_TARGET`` of each target, and ``teacher_hidden`` where that counts.

        ``kinds``: of the predictions, equally many for each target, whose mean counts. ``target_weights``: by the
        targets' names, in order.
        """
        each = len(kinds) // len(target_weights)

        def terms(student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
            each_one = zip(kinds, student.predictions, teacher.predictions, strict=True)
            losses = [follow(*one, self.temperature, batch.examples_in_step) for one in each_one]
            named = {
                f"teacher_{name}": self.weight * weight * torch.stack(losses[i * each : (i + 1) * each]).mean()
                for i, (name, weight) in enumerate(target_weights.items())
            }
            if self.hidden_weight:
                real = getattr(student, "real_BS", None)
                hidden = hidden_mse(student.hidden_states, teacher.hidden_states, batch.tokens_in_step, real)
                named["teacher_hidden"] = self.hidden_weight * hidden
            return named

        return terms


def follow(kind: PredictionKind, student: Tensor, teacher: Tensor, temperature: float, examples_in_step: int) -> Tensor:
    """Return how far a prediction is from the teacher's, over the examples of the whole step; 0-dim, at least fp32.

    ``student``, ``teacher``: (B, ...), with the classes, if any, on the last axis.
    """
    positions = math.prod(student.shape[1:-1] if kind == "classes" else student.shape[1:])
    count = examples_in_step * positions
    if kind == "number":
        return prediction_mse(student, teacher, count)
    if kind == "binary":
        return binary_kl(student, teacher, temperature, count)
    return softened_kl(student, teacher, temperature, count)


def softened_kl(student: Tensor, teacher: Tensor, temperature: float, count: int) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)) of (..., C) logits, a sum over positions / ``count``.

    Its gradient is T (softmax(student / T) - softmax(teacher / T)) for each position and class. Logits may be -inf, or
    the least number there is, in both alike.
    """
    log_p, log_q = (
        (at_least_fp32(logits) / temperature).log_softmax(dim=-1).clamp_min(torch.finfo(torch.float32).min)
        for logits in (student, teacher)
    )
    return temperature**2 * F.kl_div(log_p, log_q, reduction="sum", log_target=True) / count
