"""--resume goes on with the same run: what would make its record false is refused, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.helpers.commands import dist_moe, succeed
from tests.helpers.runs import records_of, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("same_run")
    config = write_config(root, tiny_data, train={"max_steps": 6})
    succeed(1, "train", config, "--run-dir", root / "run")
    return root / "run"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("seed=5", "seed=5"),
        ("target_weights=[0.9, 0.1]", "target_weights=[0.9, 0.1]"),
        ("data.negatives=per_user", "data.negatives='per_user'"),
        ("data.seed=3", "data.seed=3"),
        ("model.dropout=0.1", "model.dropout=0.1"),
        ("model.gate.k=3", "model.gate="),
        ("model.permutation.epochs=1", "model.permutation="),
        ("train.batch_size=32", "train.batch_size=32"),
    ],
)
def test_another_run_is_refused_and_the_record_stays(run: Path, override: str, field: str) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    (outcome,) = dist_moe(1, "train", "--resume", run, override)
    assert outcome.code == 2
    assert f"{field}" in outcome.err
    assert "start a new run" in outcome.err
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_length_may_change_and_is_recorded(run: Path) -> None:
    environment = (run / "environment.json").read_bytes()
    succeed(1, "train", "--resume", run, "train.max_steps=9", "seed=0")
    assert [record["step"] for record in records_of(run)] == list(range(1, 10))
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["max_steps"] == 9
    assert (run / "environment.json").read_bytes() == environment


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.gate.k=5", "model.gate.k=5 exceeds num_experts=4"),
        ("parallel.expert_parallel_size=3", "parallel.expert_parallel_size=3 does not divide"),
        ("deepspeed.zero_optimization.stage=4", "deepspeed.zero_optimization.stage"),
        ("model.name=two_image_classifier", "model"),
        ("target_weights=[0, 0]", "target_weights=[0.0, 0.0]: one of them must be above 0"),
        ("model.gate={name: top_k, gamma: 1}", "model.gate.gamma=1: there is no such field with this model.gate.name"),
    ],
)
def test_config_refuses_what_training_would_refuse(run: Path, override: str, message: str) -> None:
    (outcome,) = dist_moe(1, "config", run / "config.yaml", override)
    assert outcome.code == 2
    assert message in outcome.err
    assert "did you mean model.gate.gamma" not in outcome.err
