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
from dist_moe.tasks.task import Columns, Metrics


class QuestionAnsweringTask(LabelledTextTask):
    """Cross-entropies of the first and the last token of the answer; [CLS] is both where there is none.

    ``longest_answer``: tokens that a predicted answer may have.
    """

    kind = "question_answering"

    loss_name = "ce"

    def __init__(self, data: Questions, encoder: Encoder, longest_answer: int) -> None:
        super().__init__(data, encoder)
        self._longest = longest_answer

    def model_inputs(self) -> dict[str, Any]:
        return {"shape": self.encoder.shape}

    def losses(self, predictions: tuple[Tensor, ...], label_B: Tensor) -> Tensor:
        """See :func:`span_losses`."""
        start_BS, end_BS = predictions
        return span_losses(start_BS, end_BS, label_B)

    def observe(self, output: ModelOutput, batch: LabelledBatch) -> Tensor:
        """Rows: the loss of each window, the score of [CLS], and the best span's score, first and last token."""
        start_BS, end_BS = (logits_BS.double() for logits_BS in output.predictions)
        loss_B = self.losses((start_BS, end_BS), batch.label_B)
        best = best_spans(start_BS, end_BS, _text_of(batch), self._longest)
        return torch.stack([loss_B, start_BS[:, 0] + end_BS[:, 0], *(row_B.double() for row_B in best)])

    def metrics(self, columns: Columns, part: AnswerTable, weights: tuple[float, ...]) -> Metrics:
        """``ce`` over windows; exact match and F1 over questions, of all and of those with and without an answer."""
        loss_N, none_N, score_N, first_N, last_N = columns
        mean = float(loss_N.mean())
        windows = answering_windows(np.asarray(part.question_N), none_N, score_N)
        answers = [
            "" if window == NO_WINDOW else part.text(int(window), int(first_N[window]), int(last_N[window]))
            for window in windows
        ]
        return answer_metrics(answers, part.references) | {self.loss_name: mean, "loss": weights[0] * mean}

    def baselines(self, part: AnswerTable, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """``no answer``: whoever says of every question that its text has none."""
        return {"no answer": answer_metrics([""] * len(part.references), part.references)}


def _text_of(batch: LabelledBatch) -> Tensor:
    """(B, S) bool: the tokens of the text; not the question's, nor the [SEP] at the end, nor padding."""
    assert batch.type_BS is not None, "a question and its text are a pair"
    position_S = torch.arange(batch.token_BS.shape[1], device=batch.token_BS.device)
    return (batch.type_BS == 1) & (position_S < batch.length_B.unsqueeze(1) - 1)
