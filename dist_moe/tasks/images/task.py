"""MultiMNIST and MultiFashionMNIST as a task: which two images were added to one another?"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.data.two_images import FRAME_SIDE, ImageBatch, ImagePairs, TwoImages
from dist_moe.models import ModelOutput
from dist_moe.models.two_image_classifier import NUM_IDS, pixel_ids
from dist_moe.tasks.objective import at_least_fp32
from dist_moe.tasks.task import Categories, Columns, Metrics, PredictionKind, Task

NUM_CLASSES = 10
TARGETS = ("top_left", "bottom_right")


class TwoImagesTask(Task):
    """One cross-entropy per image; gates that route by identity see a hash of the pixels."""

    kind = "two_images"

    def __init__(self, data: TwoImages) -> None:
        self.train, self.val, self.test = data.train, data.val, data.test
        self._train_labels_NG = data.train.labels_NG
        self.manifest: dict[str, Any] = data.manifest

    def model_inputs(self) -> dict[str, Any]:
        """Return side of the frame, number of classes, number of targets."""
        return {"side": FRAME_SIDE, "num_classes": NUM_CLASSES, "num_targets": len(TARGETS)}

    @property
    def prediction_kinds(self) -> tuple[PredictionKind, ...]:
        """The logits of each image's class."""
        return ("classes", "classes")

    def id_counts(self) -> Tensor:
        """Return how often each hash of pixels occurs."""
        return self._id_counts

    @cached_property
    def _id_counts(self) -> Tensor:
        counts = torch.zeros(NUM_IDS, dtype=torch.int64)
        for index_B in shard_batches(self.train, 1024, rank=0, world_size=1):
            counts += torch.bincount(pixel_ids(self.train.batch(index_B, index_B).image_BD), minlength=NUM_IDS)
        return counts

    def task_losses(self, output: ModelOutput, batch: ImageBatch) -> dict[str, Tensor]:
        """Return ``ce_TARGET``: cross-entropy of each image's class, a sum over the step's number of examples."""
        return {
            f"ce_{target}": F.cross_entropy(at_least_fp32(logit_BC), label_B, reduction="sum") / batch.examples_in_step
            for target, logit_BC, label_B in zip(TARGETS, output.predictions, batch.label_BG.unbind(1), strict=True)
        }

    def observe(self, output: ModelOutput, batch: ImageBatch) -> Tensor:
        """Return the cross-entropy of each target, then whether each target's class is right."""
        pairs = list(zip(output.predictions, batch.label_BG.unbind(1), strict=True))
        surprise = [F.cross_entropy(logit_BC.double(), label_B, reduction="none") for logit_BC, label_B in pairs]
        right = [(logit_BC.argmax(1) == label_B).double() for logit_BC, label_B in pairs]
        return torch.stack(surprise + right)

    def metrics(self, columns: Columns, part: ImagePairs, weights: tuple[float, ...]) -> Metrics:
        """Return accuracy and cross-entropy of each target, their mean accuracy and weighted loss."""
        means = columns.mean(axis=1)
        ce, accuracy = means[: len(TARGETS)], means[len(TARGETS) :]
        return (
            {f"accuracy_{target}": float(a) for target, a in zip(TARGETS, accuracy, strict=True)}
            | {f"ce_{target}": float(c) for target, c in zip(TARGETS, ce, strict=True)}
            | {"accuracy": float(accuracy.mean()), "loss": float(np.dot(weights, ce))}
        )

    def categories(self, part: ImagePairs) -> Categories:
        """Return the class of the first of the two images."""
        return Categories(
            tuple(f"{TARGETS[0]}: {i}" for i in range(NUM_CLASSES)), part.labels_NG[:, 0].astype(np.int64)
        )

    def baselines(self, part: ImagePairs, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """Return ``constant``: the share of each class among the training labels."""
        columns = []
        for train_N, label_N in zip(self._train_labels_NG.T, part.labels_NG.T, strict=True):
            share_C = np.bincount(train_N, minlength=NUM_CLASSES) / len(train_N)
            columns.append((-np.log(share_C[label_N]), label_N == share_C.argmax()))
        stacked = np.array([c for c, _ in columns] + [right for _, right in columns], dtype=np.float64)
        return {"constant": self.metrics(stacked, part, weights)}
