"""Labelled texts as a task: the class of a text or of a pair of texts, or a number about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.labelled_text import LabelledBatch, LabelledTable, LabelledText
from dist_moe.models import ModelOutput
from dist_moe.tasks.labelled_text.classification_metrics import METRICS
from dist_moe.tasks.labelled_text.encoder import Encoder
from dist_moe.tasks.labelled_text.task import LabelledTextTask
from dist_moe.tasks.task import Columns, Metrics

CROSS_ENTROPY, SQUARED_ERROR = "ce", "mse"


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
        return SQUARED_ERROR if self.is_regression else CROSS_ENTROPY

    def model_inputs(self) -> dict[str, Any]:
        return {"shape": self.encoder.shape, "num_labels": self.num_outputs}

    def losses(self, predictions: tuple[Tensor, ...], label_B: Tensor) -> Tensor:
        """Cross-entropy of class numbers, squared error of numbers."""
        (predicted_BC,) = predictions
        if self.is_regression:
            return (predicted_BC[:, 0] - label_B).square()
        return F.cross_entropy(predicted_BC, label_B, reduction="none")

    def observe(self, output: ModelOutput, batch: LabelledBatch) -> Tensor:
        """Rows: the loss of each example, and the class or the number that is predicted."""
        predicted_BC = output.predictions[0].double()
        answer_B = predicted_BC[:, 0] if self.is_regression else predicted_BC.argmax(1).double()
        return torch.stack([self.losses((predicted_BC,), batch.label_B), answer_B])

    def metrics(self, columns: Columns, part: LabelledTable, weights: tuple[float, ...]) -> Metrics:
        loss_N, answer_N = columns
        mean = float(loss_N.mean())
        metrics = {name: METRICS[name](answer_N, np.asarray(part.target_N)) for name in self._task.metrics}
        return metrics | {self.loss_name: mean, "loss": weights[0] * mean}

    def baselines(self, part: LabelledTable, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """``constant``: the share of each class among the training examples, or the mean of their numbers."""
        train_N, target_N = np.asarray(self.train.target_N), np.asarray(part.target_N)
        columns = _mean(train_N, target_N) if self.is_regression else _shares(train_N, target_N, self.num_outputs)
        return {"constant": self.metrics(columns, part, weights)}


def _mean(train_N: NDArray[Any], target_N: NDArray[Any]) -> Columns:
    """Columns as `TextClassificationTask.observe` gives them, of who always says the training mean."""
    mean = train_N.astype(np.float64).mean()
    return np.stack([(target_N - mean) ** 2, np.full(len(target_N), mean)])


def _shares(train_N: NDArray[Any], target_N: NDArray[Any], classes: int) -> Columns:
    """The same of the training shares; one count is added to each class, so that one without training examples
    costs much but not everything."""
    share_C = (np.bincount(train_N, minlength=classes) + 1) / (len(train_N) + classes)
    return np.stack([-np.log(share_C[target_N]), np.full(len(target_N), float(share_C.argmax()))])
