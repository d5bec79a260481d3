"""Checkpoints with right digests over contents that make no sense: a sentence, or no harm; nothing is removed."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_moe.engine.checkpoint import write_model
from dist_moe.engine.checkpoint.files import newest_checkpoint, newest_good_checkpoint
from dist_moe.errors import UserError
from tests.helpers.commands import run_here
from tests.helpers.pool import on_ranks
from tools import mutate_checkpoints as tool

COUNT, MANY = 36, 3000
MASTER, SQUARES = "moe.gates.0.leaf_weight|master", "moe.gates.0.leaf_weight|exp_avg_sq"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (run,) = on_ranks(1, tool.train, tmp_path_factory.mktemp("changed"))
    return Path(run)


def attempts(run: Path, scratch: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    drawn, outcomes, wrong = random.Random(seed), Counter[str](), []
    for index in range(count):
        what, outcome, faults = tool.attempt(run, scratch, index, drawn, resume)
        outcomes[outcome] += 1
        wrong += [f"{index}: {what}: {fault}" for fault in faults]
    return outcomes, wrong


def resume(run: Path) -> int:
    return run_here(["train", "--resume", str(run), "train.max_steps=6"]).code


def test_every_change_is_refused_or_does_no_harm(trained: Path, tmp_path: Path) -> None:
    ((outcomes, wrong),) = on_ranks(1, attempts, trained, tmp_path / "run", COUNT, 0)
    assert wrong == []
    assert outcomes["refused"] > COUNT / 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_changes(trained: Path, tmp_path: Path, seed: int) -> None:
    for part in range(MANY // 4 // 125):
        ((_, wrong),) = on_ranks(1, attempts, trained, tmp_path / "run", 125, 1000 * seed + part)
        assert wrong == []


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


Change = Callable[[dict[str, Tensor]], None]


def change_dense(run: Path, change: Change) -> None:
    """Change the dense tensors of the newest checkpoint; digests are right afterwards."""
    directory = newest_checkpoint(run)
    tensors = load_file(directory / "dense.safetensors")
    change(tensors)
    save_file(tensors, directory / "dense.safetensors")
    tool.seal(directory, json.loads((directory / "manifest.json").read_text()))


def set_number(name: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return change


def replace(name: str, convert: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = convert(tensors[name]).contiguous()

    return change


def refusal(run: Path) -> str:
    """The refusal of the run's only checkpoint, of which nothing is removed."""
    before = tool.state_of(run)
    with pytest.raises(UserError) as error:
        newest_good_checkpoint(run)
    assert tool.state_of(run) == before
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (replace(MASTER, Tensor.half), [MASTER, "torch.float16", "torch.float32"]),
        (replace(MASTER, Tensor.int), [MASTER, "torch.int32"]),
        (replace(SQUARES, Tensor.double), [SQUARES, "torch.float64"]),
        (set_number(SQUARES, -1.0), [SQUARES, "-1", "never negative"]),
        (set_number(SQUARES, float("nan")), [SQUARES, "not finite"]),
        (set_number(MASTER, float("inf")), [MASTER, "not finite"]),
        (replace(SQUARES, lambda tensor: tensor.view(-1)), [SQUARES, "shape"]),
        (lambda tensors: tensors.pop(SQUARES), ["moe.gates.0.leaf_weight", "['master', 'exp_avg']"]),
        (lambda tensors: tensors.pop(MASTER), ["moe.gates.0.leaf_weight", "no master"]),
        (lambda tensors: tensors.update({"x": torch.zeros(2)}), ["dense.safetensors", "'x'"]),
        (lambda tensors: tensors.update({"moe.experts.weight|master|0": torch.zeros(2)}), ["already"]),
        (set_number("moe.slot_map.table|buffer", 4), ["moe.slot_map.table", "4", "0..3"]),
        (set_number("moe.slot_map.table|buffer", -1), ["moe.slot_map.table", "-1", "0..3"]),
        (replace("moe.slot_map.step|buffer", lambda step: step - 9), ["moe.slot_map.step", "-5"]),
        (set_number("moe.slot_map.soft|buffer", float("nan")), ["moe.slot_map.soft", "not finite"]),
        (set_number("moe.slot_map.soft|buffer", float("inf")), ["moe.slot_map.soft", "not finite"]),
    ],
)
def test_tensors_that_no_training_writes(run: Path, change: Change, parts: list[str]) -> None:
    change_dense(run, change)
    message = refusal(run)
    for part in [str(newest_checkpoint_directory(run)), *parts]:
        assert part in message


def newest_checkpoint_directory(run: Path) -> Path:
    return tool.complete_directories(tool.checkpoints_of(run))[-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -5),
        ("step", 5),
        ("step", "4"),
        ("step", 4.5),
        ("step", True),
        ("scalars", {"step": "x"}),
        ("scalars", {"step": float("inf")}),
        ("scalars", {"step": -5.0}),
        ("scalars", {"x": 4.0}),
        ("scalars", {}),
        ("schedule_steps", -1),
        ("schedule_steps", 5),
        ("schedule_steps", "x"),
        ("validation_losses", {"x": 1.0}),
        ("validation_losses", {"99": 1.0}),
        ("validation_losses", [1.0]),
        ("training_seconds", -1),
        ("imported_from", 3),
        ("placements", {"moe": {"num_ranks": 1, "expert_of_position": [0, 0, 1, 2]}}),
        ("placements", {"moe": {"num_ranks": 3, "expert_of_position": [0, 1, 2, 3]}}),
        ("placements", {"moe": {"num_ranks": 1, "expert_of_position": [1, 0]}}),
        ("placements", {"other": {"num_ranks": 1, "expert_of_position": [1, 0]}}),
        ("placements", {"moe": {}}),
        ("callbacks", {"x": 1}),
        ("x", 1),
    ],
)
def test_states_that_no_training_writes(run: Path, name: str, value: Any) -> None:
    directory = newest_checkpoint(run)
    trainer = directory / "trainer.json"
    trainer.write_text(json.dumps(json.loads(trainer.read_text()) | {name: value}))
    tool.seal(directory, json.loads((directory / "manifest.json").read_text()))
    message = refusal(run)
    assert str(directory) in message
    assert name in message


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", ".", "", "sub/x", "x.safetensors", "manifest.json"])
def test_a_manifest_names_no_file_elsewhere(run: Path, name: str) -> None:
    directory = newest_checkpoint(run)
    (directory.parent / "outside").write_text("private")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name], manifest["sizes"][name] = "0" * 64, 7
    tool.seal(directory, manifest)
    message = refusal(run)
    assert str(directory / "manifest.json") in message
    assert "files" in message


def test_what_is_not_finite_is_named_by_every_command(run: Path, tmp_path: Path) -> None:
    name = "moe.gates.0.leaf_weight"
    change_dense(run, set_number(f"{name}|master", float("nan")))
    export = ["export", run, tmp_path / "x.safetensors"]
    for command in (["evaluate", run], export, ["inspect", run], ["train", "--resume", run]):
        (outcome,) = on_ranks(1, run_here, [str(part) for part in command])
        assert outcome.code == 2, command
        assert f"{name}|master holds 1 number(s) that are not finite" in outcome.err
    assert not (tmp_path / "x.safetensors").exists()


def test_an_exported_file_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"x\.safetensors.*not finite.*weight"):
        write_model(model, tmp_path / "x.safetensors", {})
