"""Questions as a task whose answers are pieces of a text: SQuAD v2."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_moe.data.labelled_text import AnswerTable, LabelledBatch, Questions
from dist_moe.models import ModelOutput
from dist_moe.tasks.labelled_text.answer_metrics import answer_metrics
from dist_moe.tasks.labelled_text.answer_spans import NO_WINDOW, answering_windows, best_spans, span_losses
from dist_moe.tasks.labelled_text.encoder import Encoder
from dist_moe.tasks.labelled_text.task import LabelledTextTask
from dist_moe.tasks.task import Columns, Metrics, PredictionKind


class QuestionAnsweringTask(LabelledTextTask):
    """Cross-entropies of the first and the last token of the answer; [CLS] is both where there is none.

    ``longest_answer``: tokens that a predicted answer may have.
    """

    kind = "question_answering"

    loss_name = "ce"

    def __init__(self, data: Questions, encoder: Encoder, longest_answer: int) -> None:
        super().__init__(data, encoder)
        self._longest = longest_answer

    @property
    def prediction_kinds(self) -> tuple[PredictionKind, ...]:
        """The logits of an answer's first token among all of a window, and of its last one."""
        return ("classes", "classes")

    def model_inputs(self) -> dict[str, Any]:
        """Return the encoder's sizes."""
        return {"shape": self.encoder.shape}

    def losses(self, predictions: tuple[Tensor, ...], label_B: Tensor) -> Tensor:
        """Return the loss of each window, see :func:`span_losses`."""
        start_BS, end_BS = predictions
        return span_losses(start_BS, end_BS, label_B)

    def observe(self, output: ModelOutput, batch: LabelledBatch) -> Tensor:
        """Return the loss of each window, the score of [CLS], and the best span's score, first and last token."""
        start_BS, end_BS = (logits_BS.double() for logits_BS in output.predictions)
        loss_B = self.losses((start_BS, end_BS), batch.label_B)
        assert batch.type_BS is not None, "a question and its text are a pair"
        position_S = torch.arange(batch.token_BS.shape[1], device=batch.token_BS.device)
        # Not the question's tokens, nor the [SEP] at the end, nor padding.
        text_BS = (batch.type_BS == 1) & (position_S < batch.length_B.unsqueeze(1) - 1)
        best = best_spans(start_BS, end_BS, text_BS, self._longest)
        return torch.stack([loss_B, start_BS[:, 0] + end_BS[:, 0], *(row_B.double() for row_B in best)])

    def metrics(self, columns: Columns, part: AnswerTable, weights: tuple[float, ...]) -> Metrics:
        """Return ``ce`` over windows; exact match and F1 over questions: all, those with and without an answer."""
        loss_N, none_N, score_N, first_N, last_N = columns
        mean = float(loss_N.mean())
        windows = answering_windows(np.asarray(part.question_N), none_N, score_N)
        answers = [
            "" if window == NO_WINDOW else part.text(int(window), int(first_N[window]), int(last_N[window]))
            for window in windows
        ]
        return answer_metrics(answers, part.references) | {self.loss_name: mean, "loss": weights[0] * mean}

    def undefined(self, part: AnswerTable, weights: tuple[float, ...]) -> dict[str, str]:
        """Return why there are no metrics of questions with, or without, an answer."""
        kinds = {bool(references) for references in part.references}
        reasons: dict[str, str] = {}
        for suffix, kind, which in (("_answered", True, "no"), ("_unanswerable", False, "every")):
            if kind not in kinds:
                reasons |= {name + suffix: f"{which} question has an answer" for name in ("exact_match", "f1")}
        return reasons

    def baselines(self, part: AnswerTable, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """Return ``no answer``: whoever says of every question that its text has none."""
        return {"no answer": answer_metrics([""] * len(part.references), part.references)}
