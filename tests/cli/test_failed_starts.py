"""Starts that fail, and runs that died early: the corrected command works in the same directory, and no run is lost."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest

from dist_moe.engine.checkpoint.files import checkpoints_of
from dist_moe.engine.monitor.run_directory import RunDirectory
from tests.helpers.commands import Outcome, run_here, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import content_of, losses_of, records_of, summary_of, write_config

from .conftest import Refused

STEPS, EVERY = 12, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    train = {"max_steps": STEPS, "log_every": 2, "checkpoint_every": EVERY}
    return write_config(tmp_path_factory.mktemp("config"), tiny_data, train=train)


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    succeed(1, "train", config, "--run-dir", config.parent / "finished")
    return config.parent / "finished"


class Broken(Exception):
    """What goes wrong."""


def broken(place: str, arguments: list[str]) -> None:
    """The command, in which a function raises at its first call."""
    module, _, name = place.rpartition(":")
    where, _, attribute = name.rpartition(".")
    owner = importlib.import_module(module)
    owner = getattr(owner, where) if where else owner
    function = getattr(owner, attribute)

    def raise_broken(*_: object, **__: object) -> None:
        raise Broken

    setattr(owner, attribute, raise_broken)
    try:
        run_here(arguments)
    except Broken:
        return
    finally:
        setattr(owner, attribute, function)
    raise AssertionError(f"{place} was not called")


PLACES = [
    "dist_moe.recipes.supervised.recipe:feed_of",
    "dist_moe.recipes.supervised.recipe:process_groups",
    "dist_moe.recipes.supervised.recipe:build_model",
    "dist_moe.engine.training:ExpertParallelEngine",
    "dist_moe.engine.training:Trainer._train_step",
    "dist_moe.engine.deepspeed.engine:ExpertParallelEngine.step",
]


@pytest.mark.parametrize("place", PLACES)
def test_what_fails_before_the_first_step_is_done_leaves_no_run(config: Path, tmp_path: Path, place: str) -> None:
    run = tmp_path / "runs" / "run"
    command = ["train", str(config), "--run-dir", str(run)]
    on_ranks(1, broken, place, command)
    assert not (run / "config.yaml").exists()
    RunDirectory(run).check_unused()
    if place == PLACES[0]:
        assert not run.parent.exists()
    if place in PLACES[-2:]:
        corrected = [*command, "seed=3", "train.batch_size=32", "train.max_steps=2"]
        succeed(1, *corrected, *(["--auto-resume"] if place == PLACES[-1] else []))
        assert [record["step"] for record in records_of(run)] == [1, 2]


def test_a_resume_that_fails_leaves_the_configuration_as_it_was(config: Path, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = (run / "config.yaml").read_bytes()
    on_ranks(1, broken, PLACES[2], ["train", "--resume", str(run), "train.max_steps=14"])
    assert (run / "config.yaml").read_bytes() == before
    succeed(1, "train", "--resume", run, "train.max_steps=14")
    assert (run / "config.yaml").read_bytes() != before


@pytest.fixture
def young(finished: Path, tmp_path: Path) -> Path:
    """A run that died before its first checkpoint."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(checkpoints_of(run))
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[: EVERY - 2]))
    return run


@pytest.mark.parametrize("command", ["resume", "auto"])
def test_a_run_without_a_checkpoint_begins_again_and_says_so(
    config: Path, finished: Path, young: Path, command: str
) -> None:
    arguments = ["--resume", young] if command == "resume" else [config, "--run-dir", young, "--auto-resume"]
    (outcome,) = succeed(1, "train", *arguments)
    assert f"{young} has no checkpoint yet: the run begins again" in outcome.err
    assert [record["step"] for record in records_of(young)] == list(range(1, STEPS + 1))
    assert losses_of(young).tolist() == losses_of(finished).tolist()


def test_another_run_does_not_begin_in_its_place(refused: Refused, config: Path, young: Path) -> None:
    before = content_of(young)
    auto = ["train", config, "--run-dir", young, "--auto-resume"]
    refused([*auto, "seed=7"], "seed=7", "was trained with 0")
    refused([*auto, "model.num_experts=8"], "model.num_experts=8")
    refused(["train", "--resume", young, "seed=7"], "seed=7")
    refused(["train", config, "--run-dir", young], "holds a run already")
    assert content_of(young) == before


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again_by_resume(
    refused: Refused, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(checkpoints_of(run))
    before = content_of(run)
    refused(["train", "--resume", run], "no usable checkpoint")
    assert content_of(run) == before


@pytest.mark.parametrize("name", ["heartbeats", "checkpoints", "best", "stages"])
def test_a_file_in_the_place_of_a_directory(
    refused: Refused, config: Path, finished: Path, tmp_path: Path, name: str
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).write_text("mine")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_text("mine")
    for arguments in (["--resume", run], ["--run-dir", tmp_path / "new", config]):
        refused(["train", *arguments], f"{name} is no directory", "move it away")
    assert (run / name).read_text() == (tmp_path / "new" / name).read_text() == "mine"


def test_a_directory_in_the_place_of_a_file(refused: Refused, config: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "config.yaml", "summary.json", "environment.json"):
        (tmp_path / name / name).mkdir(parents=True)
        refused(["train", config, "--run-dir", tmp_path / name], f"{name} is no file", "move it away")


def resumed(run: Path) -> Outcome:
    return succeed(1, "train", "--resume", run, f"train.max_steps={STEPS + 4}")[0]


def test_lines_that_are_no_records_stop_nobody(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = [b"\xff garbage\n", b"[" * 50_000 + b"\n", b"17\n", b'{"loss": 1}\n']
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], *bad, *lines[2:]]))
    outcome = resumed(run)
    assert f"4 line(s) of {run / 'metrics.jsonl'} are no records; moved to metrics.jsonl.bad" in outcome.err
    assert (run / "metrics.jsonl.bad").read_bytes() == b"".join(bad)
    assert [record["step"] for record in records_of(run)] == [1, *range(3, STEPS + 5)]
    assert summary_of(run)["lost_records"] == {"jsonl": 4, "tensorboard": 0}


def test_a_record_in_which_a_number_is_not_finite(finished: Path, tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (run / "metrics.jsonl").read_text()
    first = json.loads(text.splitlines()[0])
    (run / "metrics.jsonl").write_text(text.replace(f'"grad_norm": {first["grad_norm"]}', '"grad_norm": NaN', 1))
    resumed(run)
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    again = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert (again["grad_norm"], again["not_finite"]) == (None, {"grad_norm": "nan"})
