"""Training on drawn neighbours: stopped and resumed, on two ranks, and with models that it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.data.graphs.tiny_graphs import write_csv
from tests.helpers.commands import run_here, succeed
from tests.helpers.runs import tensors_of


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = {"root": str(write_csv(tmp_path / "graph")), "cache": str(tmp_path / "cache"), "neighbours": [2, 1]}
    content: dict[str, Any] = {
        "data": {"name": "graph"} | data,
        "model": {"name": "node_classifier", "network": {"name": "gcn", "hidden": 8, "dropout": 0.0}},
        "train": {"batch_size": 10, "max_steps": 7},
        "deepspeed": {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}, "zero_optimization": {"stage": 0}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_resumed_run_and_two_ranks_end_alike(config: Path, tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("whole", "resumed", "shared", "graph")}
    for name, overrides in (("whole", []), ("resumed", ["train.max_steps=4"]), ("graph", ["data.neighbours=null"])):
        outcome = run_here(["train", str(config), "--run-dir", str(runs[name]), *overrides])
        assert outcome.code == 0, outcome.err
    assert run_here(["train", "--resume", str(runs["resumed"]), "train.max_steps=7"]).code == 0
    succeed(2, "train", config, "--run-dir", runs["shared"])
    ends = {name: tensors_of(run) for name, run in runs.items()}
    for name, tensor in ends["whole"].items():
        assert torch.equal(tensor, ends["resumed"][name])
        torch.testing.assert_close(tensor, ends["shared"][name], rtol=1e-5, atol=1e-6)
    # These last neighbours are really drawn: on the whole graph the run ends elsewhere.
    assert any((tensor - ends["graph"][name]).abs().max() > 1e-3 for name, tensor in ends["whole"].items())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "data.neighbours=[5]",
            r"data.neighbours=[5] is for 1 layer(s), and a network of the model has 2; give a number",
        ),
        ("model.network.norm=batch", "data.neighbours=[2, 1]: norm=batch is over all nodes of the graph; give the"),
        ("data.neighbours=[2, 0]", "data.neighbours"),
        ("data.neighbours=[]", "data.neighbours"),
    ],
)
def test_what_does_not_fit_is_told(config: Path, tmp_path: Path, override: str, said: str) -> None:
    outcome = run_here(["train", str(config), "--run-dir", str(tmp_path / "run"), override])
    assert outcome.code == 2
    assert said in outcome.err
