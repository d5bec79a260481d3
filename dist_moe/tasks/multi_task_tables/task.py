"""Tables with several targets as a task: log loss of what is binary, squared error of what is a number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.data.tables import PreparedTable, RowBatch, RowTable, Target
from dist_moe.models import ModelOutput, MoEModel, TableFeatures
from dist_moe.tasks.multi_task_tables.diagnosis import TableWatch
from dist_moe.tasks.multi_task_tables.metrics import (
    LOSSES,
    MEANS,
    constant_columns,
    labels_of,
    table_metrics,
    table_undefined,
)
from dist_moe.tasks.multi_task_tables.pictures import draw_calibration, draw_experts
from dist_moe.tasks.objective import at_least_fp32
from dist_moe.tasks.task import Categories, Columns, Metrics, PredictionKind, Task


class MultiTaskTablesTask(Task):
    """Binary and numeric ``targets`` of a table's rows; gates that route by identity see the first categorical column.

    A row counts with its weight, and for a target only if it is labelled for it.
    """

    kind = "multi_task_table"
    headlines = (*MEANS, "loss")

    def __init__(self, data: PreparedTable, targets: tuple[Target, ...]) -> None:
        self.train, self.val, self.test = data.train, data.val, data.test
        self.manifest: dict[str, Any] = data.manifest
        self.targets = targets
        self._data = data

    def model_inputs(self) -> dict[str, Any]:
        """Return the numbers of the columns, and the targets' names."""
        columns = self._data.columns
        features = TableFeatures(
            columns.sizes, len(columns.numeric), tuple((size, length) for _, size, length in columns.lists)
        )
        return {"features": features, "targets": tuple(target.name for target in self.targets)}

    @property
    def prediction_kinds(self) -> tuple[PredictionKind, ...]:
        """A logit of each binary target, and a number of each other."""
        return tuple("binary" if target.kind == "binary" else "number" for target in self.targets)

    def id_counts(self) -> Tensor | None:
        """Return how often each id of the first categorical column occurs; None if there is no such column."""
        if not self._data.columns.sizes:
            return None
        return torch.from_numpy(np.bincount(self._data.train.ids_NC[:, 0], minlength=self._data.columns.sizes[0]))

    def task_losses(self, output: ModelOutput, batch: RowBatch) -> dict[str, Tensor]:
        """Return ``log_loss_TARGET`` or ``mse_TARGET``: weighted sums over the rows labelled for a target, divided by
        the weight of those in the step. Other rows give no loss and no gradient, whatever is predicted for them."""
        losses = {}
        columns = zip(self.targets, output.predictions, batch.target_BT.unbind(1), batch.weight_in_step_T, strict=True)
        for target, predicted_B, label_B, weight_in_step in columns:
            labelled_B = ~label_B.isnan()
            predicted_B = torch.where(labelled_B, at_least_fp32(predicted_B), 0.0)
            label_B = torch.where(labelled_B, label_B, 0.0).to(predicted_B)
            loss_of = F.binary_cross_entropy_with_logits if target.kind == "binary" else F.mse_loss
            loss_B = torch.where(labelled_B, batch.weight_B, 0.0) * loss_of(predicted_B, label_B, reduction="none")
            losses[f"{LOSSES[target.kind]}_{target.name}"] = loss_B.sum() / (weight_in_step or 1.0)
        return losses

    def observe(self, output: ModelOutput, batch: RowBatch) -> Tensor:
        """Return the prediction of each target, of a binary one its logit."""
        return torch.stack([predicted_B.double() for predicted_B in output.predictions])

    def metrics(self, columns: Columns, part: RowTable, weights: tuple[float, ...]) -> Metrics:
        """Return the metrics of each target and their means, see :func:`table_metrics`."""
        return table_metrics(columns, labels_of(part, self.targets), weights)

    def undefined(self, part: RowTable, weights: tuple[float, ...]) -> dict[str, str]:
        """Return why metrics have no value: no row is labelled, one class only, no group with both."""
        return table_undefined(labels_of(part, self.targets), weights)

    def baselines(self, part: RowTable, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """Return ``constant``: each target's mean over the training rows."""
        columns = constant_columns(labels_of(self._data.train, self.targets), len(part))
        return {"constant": self.metrics(columns, part, weights)}

    def categories(self, part: RowTable) -> Categories:
        """Return which of the first target's labels each row has: yes or no, or the quarter of its numbers."""
        target, label_N = self.targets[0], np.asarray(part.target_NT[:, 0], dtype=np.float64)
        if target.kind == "binary":
            borders, words = np.array([0.5]), ["no", "yes"]
        else:
            borders, words = np.nanquantile(label_N, (0.25, 0.5, 0.75)), [f"quarter {i}" for i in range(1, 5)]
        names, kind_N = [f"{target.name}: {word}" for word in words], np.searchsorted(borders, label_N)
        return Categories((*names, "not labelled"), np.where(np.isnan(label_N), len(names), kind_N).astype(np.int64))

    def watch(self, model: MoEModel) -> TableWatch:
        """Return what looks at the experts and at the calibration, see :class:`TableWatch`."""
        return TableWatch(model, self.targets)

    def draw(self, directory: Path, metrics: Mapping[str, Any]) -> None:
        """Draw ``experts.png``, of a model with experts, and ``calibration.png``, with a binary target."""
        draw_experts(directory / "experts.png", metrics["experts"])
        draw_calibration(directory / "calibration.png", metrics["calibration_bins"])
