"""Run directories and checkpoints that cannot be used: exit code 2, the file by name, and what to do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories
from tests.helpers.board import read_board, steps_of
from tests.helpers.commands import succeed
from tests.helpers.runs import largest_difference, losses_of, records_of, tensors_of, write_config

from .conftest import Refused

STEPS, EVERY = 8, 4
FILES = ["dense.safetensors", "experts-00000.safetensors", "trainer.json", "manifest.json"]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = [flip_a_bit, cut_short, os.remove]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """A run of one process with two checkpoints."""
    root = tmp_path_factory.mktemp("finished")
    train = {"max_steps": STEPS, "checkpoint_every": EVERY, "log_every": 3}
    succeed(1, "train", "--run-dir", root / "run", write_config(root, tiny_data, train=train))
    return root / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def checkpoints(run: Path) -> tuple[Path, Path]:
    older, newer = complete_directories(checkpoints_of(run))
    return older, newer


def damage_manifest_digest(file: Path) -> None:
    text = file.read_text()
    digest = text.split('"')[-2]
    file.write_text(text.replace(digest, digest[::-1]))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_the_only_checkpoint_is_damaged(refused: Refused, run: Path, name: str, damage: Callable[[Path], None]) -> None:
    older, newer = checkpoints(run)
    shutil.rmtree(older)
    if name == "manifest.json" and damage is flip_a_bit:
        damage_manifest_digest(newer / name)
    else:
        damage(newer / name)
    part = str(newer) if name == "manifest.json" else str(newer / name)
    refused(["train", "--resume", run], part, "--run-dir")
    refused(["evaluate", run], part)


@pytest.mark.parametrize("name", ["experts-00000.safetensors", "manifest.json"])
def test_resume_goes_on_from_the_last_good_one(refused: Refused, finished: Path, run: Path, name: str) -> None:
    """An evaluation does not: it would be of other weights than were asked for."""
    older, newer = checkpoints(run)
    cut_short(newer / name)
    refused(["evaluate", run], str(newer), name)
    (outcome,) = succeed(1, "train", "--resume", run)
    for part in ("warning", str(newer), name, older.name):
        assert part in outcome.err
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    assert steps_of(read_board(run), "loss/task") == list(range(1, STEPS + 1))
    assert losses_of(run).tolist() == losses_of(finished).tolist()
    assert largest_difference(tensors_of(run), tensors_of(finished)) == 0


def test_a_damaged_checkpoint_that_was_passed_over_is_gone(run: Path) -> None:
    """Also where the resumed run ends before it comes to that step again."""
    _, newer = checkpoints(run)
    cut_short(newer / "dense.safetensors")
    succeed(1, "train", "--resume", run, f"train.max_steps={EVERY + 2}")
    assert not newer.exists()
    assert f"step-{EVERY + 2:08d}" in succeed(1, "evaluate", run)[0].out


def test_no_checkpoint_at_all(refused: Refused, run: Path) -> None:
    shutil.rmtree(checkpoints_of(run))
    refused(["train", "--resume", run], str(run), "checkpoint", "--run-dir")
    refused(["evaluate", run], str(run), "checkpoint")


def test_a_directory_that_is_no_run(refused: Refused, tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        refused(["train", "--resume", directory], str(directory), "not a run directory")
        refused(["evaluate", directory], str(directory), "not a run directory")


def test_a_run_directory_that_is_used(refused: Refused, run: Path, config: Path) -> None:
    before = sorted(path for path in run.rglob("*") if path.is_file())
    refused(["train", "--run-dir", run, config], f"--run-dir {run}", f"--resume {run}")
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before


def test_a_run_directory_that_cannot_be_made(refused: Refused, tmp_path: Path, config: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(["train", "--run-dir", tmp_path / "file" / "run", config], "--run-dir", str(tmp_path / "file"))


def test_what_was_refused_leaves_no_run_behind(refused: Refused, tmp_path: Path, config: Path) -> None:
    refused(["train", "--run-dir", tmp_path / "run", config, "model.gate.k=99"], "model.gate.k=99")
    assert not (tmp_path / "run").exists()


def test_resume_with_a_wrong_override(refused: Refused, run: Path) -> None:
    refused(["train", "--resume", run, "model.gate.k=99"], "model.gate.k=99", "num_experts=4")
    refused(["train", "--resume", run, "train.max_stepz=9"], "did you mean train.max_steps?")


def test_resume_with_an_optimizer_or_schedule_that_cannot_go_on(refused: Refused, run: Path) -> None:
    optimizer, schedule = (
        "deepspeed.optimizer.params.amsgrad=true",
        "{type: OneCycleLR, params: {max_lr: 1, total_steps: 3}}",
    )
    refused(["train", "--resume", run, optimizer], "deepspeed.optimizer.type", "cannot go on from", "max_exp_avg_sq")
    refused(
        ["train", "--resume", run, f"deepspeed.scheduler={schedule}"], "OneCycleLR ends after 3 steps", "total_steps"
    )


def test_a_configuration_of_the_run_that_was_altered(refused: Refused, run: Path) -> None:
    (run / "config.yaml").write_text("model: {dropout: [")
    refused(["train", "--resume", run], str(run / "config.yaml"), "not YAML")
    refused(["evaluate", run], str(run / "config.yaml"), "not YAML")
