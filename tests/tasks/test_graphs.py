"""Classes of nodes as a task: losses and accuracy over a part by plain loops, whatever the batches and ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_moe.data.graphs import OwnGraphConfig
from dist_moe.models import ModelOutput
from dist_moe.tasks.graphs import NodeClassificationTask
from tests.data.graphs.tiny_graphs import write_npz


@pytest.fixture
def task(tmp_path: Path) -> NodeClassificationTask:
    config = OwnGraphConfig(name="graph", root=str(write_npz(tmp_path / "g.npz")), cache=str(tmp_path / "cache"))
    return NodeClassificationTask(config.prepare(progress=False))


def test_losses_and_accuracy_are_those_of_a_loop(task: NodeClassificationTask) -> None:
    logit_NC = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = np.arange(len(task.val))
    shares = [task.val.batch(some, rows) for some in (rows[:4], rows[4:4], rows[4:])]
    outputs = [ModelOutput((logit_NC[batch.inputs[2]],), ()) for batch in shares]
    losses = [task.task_losses(out, batch)["ce_class"] for out, batch in zip(outputs, shares, strict=True)]
    observed = [task.observe(out, batch) for out, batch in zip(outputs, shares, strict=True)]
    metrics = task.metrics(torch.cat(observed, dim=1).numpy(), task.val, (0.5,))
    pairs = list(zip(task.val.node_N.tolist(), task.val.label_N.tolist(), strict=True))
    expected = np.mean([float(-logit_NC[v].log_softmax(0)[y]) for v, y in pairs])
    assert float(sum(losses)) == pytest.approx(expected)
    assert metrics["loss"] == pytest.approx(expected / 2)
    # OGB's evaluator: the share of right nodes among all labelled nodes of the part.
    assert metrics["accuracy"] == pytest.approx(np.mean([int(logit_NC[v].argmax()) == y for v, y in pairs]))


def test_every_change_of_the_data_is_told(task: NodeClassificationTask) -> None:
    before = task.digests()
    assert before.keys() == {"train", "val", "test", "graph", "sizes"}
    task.val.label_N[0] = 1 - min(task.val.label_N[0], 1)
    task.graph.edge_2E[0, 0] += 1
    after = task.digests()
    assert {name for name in before if before[name] != after[name]} == {"val", "graph"}


def test_the_constant_predictor_has_the_shares_of_the_training_nodes(task: NodeClassificationTask) -> None:
    constant = task.baselines(task.test, (1.0,))["constant"]
    count = np.bincount(task.train.label_N)
    assert constant["accuracy"] == pytest.approx(np.mean(task.test.label_N == count.argmax()))
    assert task.id_counts().tolist() == [float(node in task.train.node_N) for node in range(60)]
