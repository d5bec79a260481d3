"""MovieLens as a task: was the item watched (cross-entropy), and how was it rated (squared error)?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.data.movielens import MovieLens, PairBatch, PairTable
from dist_moe.models import ModelOutput
from dist_moe.tasks.objective import at_least_fp32
from dist_moe.tasks.recommendation.baselines import baseline_metrics
from dist_moe.tasks.recommendation.metrics import two_task_metrics
from dist_moe.tasks.task import Categories, Columns, Metrics, PredictionKind, Task

TARGETS = ("watched", "rating")


class RecommendationTask(Task):
    """Two tasks on (user, item) pairs; gates that route by identity see the user."""

    kind = "recommendation"

    def __init__(self, data: MovieLens) -> None:
        self.train, self.val, self.test = data.train, data.val, data.test
        self.manifest: dict[str, Any] = data.manifest
        self._data = data

    def model_inputs(self) -> dict[str, Any]:
        """Return the numbers of users, items and targets."""
        return {"num_users": self._data.num_users, "num_items": self._data.num_items, "num_targets": len(TARGETS)}

    @property
    def prediction_kinds(self) -> tuple[PredictionKind, ...]:
        """The logit of "watched", and the stars."""
        return ("binary", "number")

    def id_counts(self) -> Tensor:
        """Return how often each user occurs."""
        return torch.from_numpy(np.bincount(self._data.train.user_N, minlength=self._data.num_users))

    def task_losses(self, output: ModelOutput, batch: PairBatch) -> dict[str, Tensor]:
        """Return ``bce`` over all pairs, ``mse`` over the rated ones; each a sum over the step's number of those."""
        logit_B, stars_B = (at_least_fp32(prediction) for prediction in output.predictions)
        watched_B = batch.rating_B > 0
        bce = F.binary_cross_entropy_with_logits(logit_B, watched_B.to(logit_B), reduction="sum")
        error_B = torch.where(watched_B, stars_B - batch.rating_B, 0.0)
        return {
            "bce": bce / batch.examples_in_step,
            "mse": error_B.square().sum() / max(batch.rated_in_step, 1),
        }

    def observe(self, output: ModelOutput, batch: PairBatch) -> Tensor:
        """Return the probability of "watched", and the stars."""
        logit_B, stars_B = output.predictions
        return torch.stack([logit_B.double().sigmoid(), stars_B.double()])

    def metrics(self, columns: Columns, part: PairTable, weights: tuple[float, ...]) -> Metrics:
        """Return AUC, losses and squared error, see :func:`two_task_metrics`."""
        probability_N, stars_N = columns
        return two_task_metrics(probability_N, stars_N, np.asarray(part.rating_N), weights)

    def undefined(self, part: PairTable, weights: tuple[float, ...]) -> dict[str, str]:
        """Return why there is no AUC, or no squared error."""
        watched_N = np.asarray(part.rating_N) > 0
        if watched_N.all():
            return {"auc": "one class only, all pairs are watched"}
        if watched_N.any():
            return {}
        reasons = dict.fromkeys(("auc", "mse"), "one class only, no pair is watched and rated")
        return reasons | ({} if weights[0] else {"loss": reasons["mse"]})

    def categories(self, part: PairTable) -> Categories:
        """Return whether each pair was watched, and how it was rated, in whole stars."""
        names = ("not watched", *(f"{stars} star{'s' * (stars > 1)}" for stars in range(1, 6)))
        return Categories(names, np.ceil(np.asarray(part.rating_N, dtype=np.float64)).astype(np.int64).clip(0, 5))

    def baselines(self, part: PairTable, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """Return the predictors that only count, see :func:`baseline_metrics`."""
        return baseline_metrics(self._data, part, weights)
