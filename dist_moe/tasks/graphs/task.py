"""The class of a node as a task: cross-entropy and accuracy over the nodes of a part, as OGB's evaluator has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.data.digests import digest_of_content
from dist_moe.data.graphs import NodeBatch, NodeGraph, NodeTable
from dist_moe.data.prepared import PARTS
from dist_moe.errors import UserError
from dist_moe.models import ModelOutput, MoEModelConfig, RunShape
from dist_moe.models.graphs import NodeNetwork
from dist_moe.models.weak_strong import WeakStrongOutput
from dist_moe.tasks.graphs.deciles import ConfidenceWatch, draw_deciles
from dist_moe.tasks.objective import at_least_fp32
from dist_moe.tasks.task import Categories, Columns, Metrics, PredictionKind, Task

WEAK_STRONG_COLUMNS = ("loss_weak", "accuracy_weak", "loss_strong", "accuracy_strong", "confidence")
"""Observed columns of a weak and a strong expert, after those of the mixture."""


class NodeClassificationTask(Task):
    """Cross-entropy of the class of each labelled node; a batch carries the whole graph, or neighbours that are drawn.

    Validation and test pass over the whole graph in any case.
    """

    kind = "nodes"
    eval_batch = 1 << 30  # the graph is passed over whole: one batch of all nodes that are asked for

    def __init__(self, data: NodeGraph) -> None:
        self.train: NodeTable = data.train
        self.val, self.test = data.val, data.test
        self.manifest: dict[str, Any] = data.manifest
        self.graph, self.num_classes = data.graph, data.num_classes

    def model_inputs(self) -> dict[str, Any]:
        """Return the numbers of features and of classes."""
        return {"num_features": self.graph.x_ND.shape[1], "num_classes": self.num_classes}

    def build_model(self, model: MoEModelConfig, run: RunShape) -> Any:
        """Return the model. Raises UserError for one that ``data.neighbours`` does not fit."""
        built = super().build_model(model, run)
        if self.train.sampler is not None:
            check_sampling(built, self.train.sampler.neighbours)
        return built

    @property
    def prediction_kinds(self) -> tuple[PredictionKind, ...]:
        """Return the kind of the only prediction: logits of classes."""
        return ("classes",)

    def digests(self) -> dict[str, str]:
        """Return digests of the graph, of the nodes and labels of each part, and of the sizes."""
        parts = {part: [getattr(self, part).node_N, getattr(self, part).label_N] for part in PARTS}
        whole = {"graph": [self.graph.x_ND, self.graph.edge_2E], "sizes": self.model_inputs()}
        return {name: digest_of_content(value) for name, value in (parts | whole).items()}

    def categories(self, part: NodeTable) -> Categories:
        """Return the class of each node."""
        return Categories(tuple(f"class {i}" for i in range(self.num_classes)), part.label_N)

    def id_counts(self) -> Tensor:
        """Return how often each node occurs in training: once or never."""
        return torch.bincount(torch.from_numpy(self.train.node_N), minlength=len(self.graph.x_ND))

    def task_losses(self, output: ModelOutput, batch: NodeBatch) -> dict[str, Tensor]:
        """Return ``ce_class``: cross-entropy of the nodes' classes, a sum over the step's number of nodes."""
        if isinstance(output, WeakStrongOutput):
            return {"ce_class": output.cross_entropy(batch.label_B).sum() / batch.examples_in_step}
        logit_BC = at_least_fp32(output.predictions[0])
        return {"ce_class": F.cross_entropy(logit_BC, batch.label_B, reduction="sum") / batch.examples_in_step}

    def observe(self, output: ModelOutput, batch: NodeBatch) -> Tensor:
        """Return the cross-entropy of each node, then whether its class is right, or how probably.

        Of a weak and a strong expert both for the mixture, the weak and the strong one, and the confidence.
        """
        if not isinstance(output, WeakStrongOutput):
            return torch.stack(_loss_and_right(output.predictions[0], batch.label_B))
        mixture = [output.cross_entropy(batch.label_B).double(), output.right(batch.label_B).double()]
        weak, strong = (_loss_and_right(logits, batch.label_B) for logits in (output.weak_BC, output.strong_BC))
        return torch.stack([*mixture, *weak, *strong, output.confidence_B.double()])

    def metrics(self, columns: Columns, part: NodeTable, weights: tuple[float, ...]) -> Metrics:
        """Return accuracy and cross-entropy over all nodes of the part; the expected ones, where a chance decides.

        Of a weak and a strong expert those of each, too, and ``strong_share``, the mean of 1 - C.
        """
        loss, accuracy, *rest = map(float, columns.mean(axis=1))
        found = {"accuracy": accuracy, "loss": weights[0] * loss}
        if rest:
            found |= dict(zip(WEAK_STRONG_COLUMNS, rest, strict=True))
            found["strong_share"] = 1 - found.pop("confidence")
        return found

    def watch(self, model: Any) -> ConfidenceWatch:
        """Return what looks at how right both experts are by confidence."""
        return ConfidenceWatch()

    def draw(self, directory: Path, metrics: Mapping[str, Any]) -> None:
        """Draw ``deciles.png`` of a weak and a strong expert."""
        if metrics.get("deciles"):
            draw_deciles(directory / "deciles.png", metrics["deciles"])

    def baselines(self, part: NodeTable, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """Return ``constant``: the share of each class among the training nodes, each counted once more."""
        count_C = 1.0 + np.bincount(self.train.label_N, minlength=self.num_classes)
        share_N = (count_C / count_C.sum())[part.label_N]
        columns = np.stack([-np.log(share_N), part.label_N == count_C.argmax()])
        return {"constant": self.metrics(columns.astype(np.float64), part, weights)}


def check_sampling(model: nn.Module, neighbours: tuple[int, ...]) -> None:
    """Raise UserError for networks that reach further than ``neighbours``, or that need all nodes of the graph."""
    hops = max((module.hops for module in model.modules() if isinstance(module, NodeNetwork)), default=0)
    if len(neighbours) < hops:
        raise UserError(
            f"data.neighbours={list(neighbours)} is for {len(neighbours)} layer(s), and a network of the model has "
            f"{hops}; give a number for each"
        )
    if any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        raise UserError(
            f"data.neighbours={list(neighbours)}: norm=batch is over all nodes of the graph; give the networks "
            "norm=layer or none, or leave data.neighbours out"
        )


def _loss_and_right(logit_BC: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
    loss_B = F.cross_entropy(logit_BC.double(), label_B, reduction="none")
    return loss_B, (logit_BC.argmax(dim=1) == label_B).double()
