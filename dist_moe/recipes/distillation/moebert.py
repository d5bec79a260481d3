"""MoEBERT's distillation: the student's hidden states and predictions follow the teacher's.

Zuo et al.: MoEBERT (NAACL 2022), which COMET-BERT (KDD 2023) takes over. With L + 1 hidden states X (the embeddings
and what each layer gives) and predicted distributions p, the student's loss is

    task loss + weight (sum over l of MSE(X_l, X_l of the teacher) + 1/2 (KL(p || q) + KL(q || p)))

with q the teacher's distribution. The MSE is a mean over positions and width, the KL one over examples; a regression
has the MSE of the predictions in place of the KL, and the two predictions of an answer's span have the mean of
theirs. Every function gives a sum divided by a count of the whole step, so that the parts of the ranks and
micro-batches add up to the step's, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dist_moe.config.settings import Settings
from dist_moe.tasks.objective import at_least_fp32


class HasHiddenStates(Protocol):
    """Outputs of student and teacher: ``predictions``, (B, C) logits each, C = 1 for a regression; ``hidden_states``,
    (B, S, D) each; ``real_BS``: bool, where there are tokens."""

    @property
    def predictions(self) -> tuple[Tensor, ...]:
        """(B, C) logits each."""

    @property
    def hidden_states(self) -> Sequence[Tensor]:
        """(B, S, D) each: the embeddings, then every layer."""

    @property
    def real_BS(self) -> Tensor:
        """Whether there is a token."""


class MoEBERTConfig(Settings):
    """Layer-wise distillation from a model of the same depth and width."""

    weight: float = Field(1.0, ge=0, description="lambda: weight of both terms (COMET-BERT: 1, 2, 3 or 5)")

    def terms(self, student: HasHiddenStates, teacher: HasHiddenStates, batch: Any) -> dict[str, Tensor]:
        """``hidden`` and ``prediction``, weighted, as :class:`DistillationObjective` wants them.

        Of several predictions, such as the start and the end of a span, the mean counts.
        """
        hidden = hidden_mse(student.hidden_states, teacher.hidden_states, batch.tokens_in_step, student.real_BS)
        pairs = list(zip(student.predictions, teacher.predictions, strict=True))
        of_each = [_prediction_loss(*pair, batch.examples_in_step) for pair in pairs]
        return {"hidden": self.weight * hidden, "prediction": self.weight * torch.stack(of_each).mean()}


def hidden_mse(
    student: Sequence[Tensor], teacher: Sequence[Tensor], positions_in_step: int, real: Tensor | None = None
) -> Tensor:
    """The sum over hidden states of the mean squared difference per position and unit; 0-dim, at least fp32.

    ``student``, ``teacher``: (..., D) each, the same number of them. ``real``: (...) bool, which positions hold
    tokens; None: all of them. ``positions_in_step``: positions of the whole step by which the sums are divided: the
    real ones, or, with ``real=None``, padding and all, as the authors' code has it.

    Raises ValueError if hidden states do not correspond.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} hidden states of the student cannot follow {len(teacher)} of the teacher")
    terms = []
    for layer, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape != theirs.shape:
            raise ValueError(f"hidden state {layer} is {tuple(ours.shape)}, but {tuple(theirs.shape)} of the teacher")
        difference = _counted(ours, real) - _counted(theirs, real)
        terms.append(difference.square().mean(dim=-1).sum() / positions_in_step)
    return torch.stack(terms).sum()


def symmetric_kl(student: Tensor, teacher: Tensor, examples_in_step: int, real: Tensor | None = None) -> Tensor:
    """1/2 (KL(p || q) + KL(q || p)) per example, p and q the softmax of (..., C) logits; 0-dim, at least fp32.

    It is 1/2 sum over classes of (p - q)(log p - log q): never negative, zero for equal distributions only, and the
    same with student and teacher exchanged. ``real``: (...) bool, which examples, or positions, count.
    """
    log_p, log_q = (_counted(logits, real).log_softmax(dim=-1) for logits in (student, teacher))
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum() / examples_in_step


def prediction_mse(student: Tensor, teacher: Tensor, examples_in_step: int) -> Tensor:
    """The squared difference per example, of (B,) or (B, 1) predictions of a regression; 0-dim, at least fp32."""
    return F.mse_loss(at_least_fp32(student), at_least_fp32(teacher), reduction="sum") / examples_in_step


def _prediction_loss(student_BC: Tensor, teacher_BC: Tensor, examples_in_step: int) -> Tensor:
    loss = prediction_mse if student_BC.shape[1] == 1 else symmetric_kl
    return loss(student_BC, teacher_BC, examples_in_step)


def _counted(x: Tensor, real: Tensor | None) -> Tensor:
    """Positions that do not count are left out first: multiplied by zero, a nan there would be one in the gradient."""
    return at_least_fp32(x if real is None else x[real])
