"""The same configuration through every launcher: the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import finish, start, succeed
from tests.helpers.pool import free_port
from tests.helpers.runs import losses_of, tensors_of, write_config

STEPS = 5
Launcher = Callable[[Path, Path], list[object]]
EP2 = "parallel.expert_parallel_size=2"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), tiny_data, train={"max_steps": STEPS})


@pytest.fixture(scope="module")
def reference(config: Path) -> Path:
    """Two ranks that no launcher started."""
    succeed(2, "train", "--run-dir", config.parent / "reference", config, EP2)
    return config.parent / "reference"


def torchrun(config: Path, run: Path) -> list[object]:
    command = ["torchrun", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "dist_moe"]
    return [*command, "train", config, "--run-dir", run, EP2]


def deepspeed(config: Path, run: Path) -> list[object]:
    command = ["deepspeed", "--num_gpus", 2, "--master_port", free_port(), "--module", "dist_moe"]
    return [*command, "train", config, "--run-dir", run, EP2]


def torchx(config: Path, run: Path) -> list[object]:
    command = ["torchx", "run", "-s", "local_cwd", "--wait", "--log", "launch/components.py:train"]
    return [*command, "--config", config, "--run_dir", run, "--ranks", 2, EP2]


@pytest.mark.parametrize("launcher", [torchrun, deepspeed, torchx])
def test_launchers_of_two_ranks_agree(config: Path, reference: Path, tmp_path: Path, launcher: Launcher) -> None:
    run = tmp_path / "run"
    outcome = finish(start(*launcher(config, run)))
    assert outcome.code == 0, outcome.err
    assert "popularity predictor" in outcome.out + outcome.err
    assert len(losses_of(run)) == STEPS
    assert losses_of(run).tolist() == losses_of(reference).tolist()
    ours, theirs = tensors_of(run), tensors_of(reference)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_exit_code_of_a_mistake(config: Path, tmp_path: Path) -> None:
    outcome = finish(start("dist-moe", "train", config, "--run-dir", tmp_path / "run", "model.gate.k=99"))
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "dist-moe: model.gate.k=99 exceeds num_experts=4; allowed: 1..4\n"
    assert not (tmp_path / "run").exists()
