"""Labelled texts as a task: the class of a text or of a pair of texts, or a number about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.data.labelled_text import LabelledBatch, LabelledTable, LabelledText
from dist_moe.models import ModelOutput
from dist_moe.tasks.labelled_text.classification_metrics import CORRELATIONS, METRICS
from dist_moe.tasks.labelled_text.encoder import Encoder
from dist_moe.tasks.labelled_text.task import LabelledTextTask
from dist_moe.tasks.task import Columns, Metrics, PredictionKind


class TextClassificationTask(LabelledTextTask):
    """Cross-entropy of classes, or squared error of numbers."""

    kind = "text_classification"

    def __init__(self, data: LabelledText, encoder: Encoder) -> None:
        super().__init__(data, encoder)
        self._task = data.task
        self.classes = data.task.classes

    @property
    def is_regression(self) -> bool:
        """Whether a number is predicted, not a class."""
        return not self.classes

    @property
    def num_outputs(self) -> int:
        """Width of the model's prediction: the number of classes, or 1 where a number is predicted."""
        return len(self.classes) or 1

    @property
    def loss_name(self) -> str:
        """``ce``, or ``mse`` where a number is predicted."""
        return "mse" if self.is_regression else "ce"

    @property
    def prediction_kinds(self) -> tuple[PredictionKind, ...]:
        """The logits of the classes, or the number."""
        return ("number",) if self.is_regression else ("classes",)

    def model_inputs(self) -> dict[str, Any]:
        """Return the encoder's sizes and the width of the prediction."""
        return {"shape": self.encoder.shape, "num_labels": self.num_outputs}

    def losses(self, predictions: tuple[Tensor, ...], label_B: Tensor) -> Tensor:
        """Return the cross-entropy of class numbers, or the squared error of numbers."""
        (predicted_BC,) = predictions
        if self.is_regression:
            return (predicted_BC[:, 0] - label_B).square()
        return F.cross_entropy(predicted_BC, label_B, reduction="none")

    def observe(self, output: ModelOutput, batch: LabelledBatch) -> Tensor:
        """Return the loss of each example, and the class or the number that is predicted."""
        predicted_BC = output.predictions[0].double()
        answer_B = predicted_BC[:, 0] if self.is_regression else predicted_BC.argmax(1).double()
        return torch.stack([self.losses((predicted_BC,), batch.label_B), answer_B])

    def metrics(self, columns: Columns, part: LabelledTable, weights: tuple[float, ...]) -> Metrics:
        """Return the data set's own metrics, and the loss."""
        loss_N, answer_N = columns
        mean = float(loss_N.mean())
        metrics = {name: METRICS[name](answer_N, np.asarray(part.target_N)) for name in self._task.metrics}
        return metrics | {self.loss_name: mean, "loss": weights[0] * mean}

    def undefined(self, part: LabelledTable, weights: tuple[float, ...]) -> dict[str, str]:
        """Return why there is no correlation, or no F1 of class 1."""
        values = np.unique(np.asarray(part.target_N))
        reasons = {}
        if "f1" in self._task.metrics and 1 not in values:
            reasons["f1"] = f"no example is {self.classes[1]}"
        if len(values) == 1:
            kind, only = ("value", f"{values[0]:g}") if self.is_regression else ("class", self.classes[int(values[0])])
            reasons |= {name: f"one {kind} only, {only}" for name in self._task.metrics if name in CORRELATIONS}
        return reasons

    def baselines(self, part: LabelledTable, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """Return ``constant``: the share of each class among the training examples, or the mean of their numbers."""
        train_N, target_N = np.asarray(self.train.target_N), np.asarray(part.target_N)
        if self.is_regression:
            answer = train_N.astype(np.float64).mean()
            loss_N = (target_N - answer) ** 2
        else:
            # One count more for each class: one without training examples costs much, but not everything.
            share_C = (np.bincount(train_N, minlength=self.num_outputs) + 1) / (len(train_N) + self.num_outputs)
            answer, loss_N = float(share_C.argmax()), -np.log(share_C[target_N])
        return {"constant": self.metrics(np.stack([loss_N, np.full(len(target_N), answer)]), part, weights)}
