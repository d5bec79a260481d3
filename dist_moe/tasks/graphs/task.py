"""The class of a node as a task: cross-entropy and accuracy over the nodes of a part, as OGB's evaluator has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.data.digests import digest_of_content
from dist_moe.data.graphs import NodeBatch, NodeGraph, NodeTable
from dist_moe.data.prepared import PARTS
from dist_moe.models import ModelOutput
from dist_moe.tasks.objective import at_least_fp32
from dist_moe.tasks.task import Columns, Metrics, Task


class NodeClassificationTask(Task):
    """Cross-entropy of the class of each labelled node; every batch carries the whole graph."""

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

    def digests(self) -> dict[str, str]:
        """Return digests of the graph, of the nodes and labels of each part, and of the sizes."""
        parts = {part: [getattr(self, part).node_N, getattr(self, part).label_N] for part in PARTS}
        whole = {"graph": [self.graph.x_ND, self.graph.edge_2E], "sizes": self.model_inputs()}
        return {name: digest_of_content(value) for name, value in (parts | whole).items()}

    def id_counts(self) -> Tensor:
        """Return how often each node occurs in training: once or never."""
        return torch.bincount(torch.from_numpy(self.train.node_N), minlength=len(self.graph.x_ND))

    def task_losses(self, output: ModelOutput, batch: NodeBatch) -> dict[str, Tensor]:
        """Return ``ce_class``: cross-entropy of the nodes' classes, a sum over the step's number of nodes."""
        logit_BC = at_least_fp32(output.predictions[0])
        return {"ce_class": F.cross_entropy(logit_BC, batch.label_B, reduction="sum") / batch.examples_in_step}

    def observe(self, output: ModelOutput, batch: NodeBatch) -> Tensor:
        """Return the cross-entropy of each node, then whether its class is right."""
        logit_BC = output.predictions[0].double()
        loss_B = F.cross_entropy(logit_BC, batch.label_B, reduction="none")
        return torch.stack([loss_B, (logit_BC.argmax(dim=1) == batch.label_B).double()])

    def metrics(self, columns: Columns, part: NodeTable, weights: tuple[float, ...]) -> Metrics:
        """Return accuracy and cross-entropy over all nodes of the part."""
        loss, accuracy = columns.mean(axis=1)
        return {"accuracy": float(accuracy), "loss": weights[0] * float(loss)}

    def baselines(self, part: NodeTable, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """Return ``constant``: the share of each class among the training nodes, each counted once more."""
        count_C = 1.0 + np.bincount(self.train.label_N, minlength=self.num_classes)
        share_N = (count_C / count_C.sum())[part.label_N]
        columns = np.stack([-np.log(share_N), part.label_N == count_C.argmax()])
        return {"constant": self.metrics(columns.astype(np.float64), part, weights)}
