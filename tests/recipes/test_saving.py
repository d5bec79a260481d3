"""Checkpoints beside the training: what is saved, and what becomes of a run whose disk fails or whose rank dies."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_moe.engine import training as loop
from dist_moe.engine.checkpoint import format as checkpoint_format
from dist_moe.engine.checkpoint import saver as checkpoint_saver
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories, newest_good_checkpoint
from dist_moe.engine.checkpoint.format import TrainingHistory
from dist_moe.engine.checkpoint.loading import load_checkpoint
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from tests.helpers.commands import Outcome, run_here, succeed
from tests.helpers.disks import remount, small_disk
from tests.helpers.pool import RankPool, on_ranks
from tests.helpers.runs import losses_of, tensors_of, write_config
from tests.helpers.toys import toy_engine

STEPS, EVERY = 20, 5
SPLIT = "parallel.expert_parallel_size=2"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    """At ZeRO stage 0, where the masters are the parameters themselves and the next step changes them in place."""
    train = {"max_steps": STEPS, "checkpoint_every": EVERY, "keep_checkpoints": 9, "log_every": 1}
    stage = {"zero_optimization": {"stage": 0}}
    directory = tmp_path_factory.mktemp("saving")
    return write_config(
        directory, tiny_data, model={"experts": {"units": 16, "dropout": 0.3}}, train=train, deepspeed=stage
    )


@pytest.fixture(scope="module")
def waiting(config: Path) -> Path:
    """A run on two ranks that waits for its checkpoints."""
    run = config.parent / "waiting"
    succeed(2, "train", "--run-dir", run, config, SPLIT, "train.async_checkpoints=false")
    return run


def steps_of(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in complete_directories(checkpoints_of(run))]


def leftovers_of(run: Path) -> list[str]:
    return [path.name for path in checkpoints_of(run).iterdir() if path.name.startswith(".")]


def assert_same_checkpoints(run: Path, reference: Path, steps: list[int]) -> None:
    for step in steps:
        for path in (checkpoints_of(reference) / f"step-{step:08d}").glob("*.safetensors"):
            ours = checkpoints_of(run) / path.parent.name / path.name
            assert ours.read_bytes() == path.read_bytes(), ours


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Any:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield original
    finally:
        setattr(owner, name, original)


def train_with_slow_writers(arguments: list[str]) -> tuple[Outcome, list[int]]:
    """No writer may write before two more steps were taken; and how many steps had been, as each began to write."""
    begun: list[int] = []
    taken = [0]
    progress = threading.Condition()
    write, seed_step = checkpoint_saver.write_tensors, loop.seed_step

    def count(*key: int) -> None:
        with progress:
            taken[0] += 1
            progress.notify_all()
        seed_step(*key)

    def slow(path: Path, tensors: Any) -> str:
        asked = int(path.parent.name.removeprefix(".step-").removesuffix(".partial"))
        with progress:
            assert progress.wait_for(lambda: taken[0] >= min(asked + 2, STEPS), timeout=20)
            begun.append(taken[0] - asked)
        return write(path, tensors)

    with replaced(checkpoint_saver, "write_tensors", slow), replaced(loop, "seed_step", count):
        return run_here(arguments), begun


def test_the_training_goes_on_meanwhile(config: Path, waiting: Path, tmp_path: Path) -> None:
    """And what is written is what was true at the step of the checkpoint, not at the time of writing."""
    run = tmp_path / "run"
    for outcome, begun in on_ranks(2, train_with_slow_writers, ["train", "--run-dir", str(run), str(config), SPLIT]):
        assert outcome.code == 0, outcome.err
        assert sum(late >= 2 for late in begun) >= 3
    assert steps_of(run) == steps_of(waiting) == [5, 10, 15, 20]
    assert leftovers_of(run) == []
    assert_same_checkpoints(run, waiting, [5, 10, 15, 20])
    assert losses_of(run).tolist() == losses_of(waiting).tolist()


def train_and_watch_writers(arguments: list[str]) -> tuple[Outcome, int, int]:
    """With a checkpoint at each step: how many were written, and the most that were in work at once."""
    counts = {"now": 0, "most": 0, "all": 0}
    run = checkpoint_saver._Job.run

    def watched(self: Any) -> None:
        counts["now"] += 1
        counts["all"] += 1
        counts["most"] = max(counts["most"], counts["now"])
        run(self)
        counts["now"] -= 1

    with replaced(checkpoint_saver._Job, "run", watched):
        return run_here(arguments), counts["all"], counts["most"]


def test_one_at_a_time(config: Path, tmp_path: Path) -> None:
    arguments = ["train", "--run-dir", str(tmp_path / "run"), str(config), "train.checkpoint_every=1"]
    ((outcome, written, most),) = on_ranks(1, train_and_watch_writers, arguments)
    assert outcome.code == 0, outcome.err
    assert (written, most) == (STEPS, 1)
    assert steps_of(tmp_path / "run") == list(range(STEPS - 8, STEPS + 1))


OF_THE_SECOND_RANK = "a file of the second rank"
FAILING: dict[str, tuple[Any, str, int]] = {
    "no directory": (checkpoint_saver.CheckpointSaver, "_prepare", 0),
    "a file of the first rank": (checkpoint_saver, "write_tensors", 0),
    OF_THE_SECOND_RANK: (checkpoint_saver, "write_tensors", 1),
    "the trainer's state": (checkpoint_format, "replace_text", 0),
    "publication": (checkpoint_saver, "publish", 0),
}


def train_with_failure(what: str, at_step: int, arguments: list[str]) -> Outcome:
    """One function fails for lack of space, on one rank, for the checkpoint of one step."""
    owner, name, rank = FAILING[what]
    original = getattr(owner, name)

    def fail(*given: Any) -> Any:
        if f"step-{at_step:08d}" in " ".join(map(str, given)) and os.environ["RANK"] == str(rank):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*given)

    with replaced(owner, name, fail):
        return run_here(arguments)


@pytest.mark.parametrize(("what", "mode"), [*((what, "true") for what in FAILING), (OF_THE_SECOND_RANK, "false")])
def test_one_that_fails_does_not_end_the_run(config: Path, waiting: Path, tmp_path: Path, what: str, mode: str) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--run-dir", str(run), str(config), SPLIT, f"train.async_checkpoints={mode}"]
    first, second = on_ranks(2, train_with_failure, what, 10, arguments)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "warning: checkpoint" in first.err
    assert f"rank {FAILING[what][2]}: OSError: [Errno 28] No space left on device" in first.err
    assert "warning" not in second.err
    assert (steps_of(run), leftovers_of(run)) == ([5, 15, 20], [])
    assert_same_checkpoints(run, waiting, [5, 15, 20])


@pytest.mark.parametrize("what", [OF_THE_SECOND_RANK, "publication"])
def test_the_last_one_must_not_fail(config: Path, waiting: Path, tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    arguments = ["train", "--run-dir", str(run), str(config), SPLIT, "train.checkpoint_failures_allowed=9"]
    outcomes = on_ranks(2, train_with_failure, what, STEPS, arguments)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "No space left on device" in outcomes[0].err
    assert "--resume" in outcomes[0].err
    assert (steps_of(run), leftovers_of(run)) == ([5, 10, 15], [])
    succeed(2, "train", "--resume", run)
    assert_same_checkpoints(run, waiting, [5, 10, 15, 20])
    assert losses_of(run).tolist() == losses_of(waiting).tolist()


def train_with_remount(at_steps: dict[int, tuple[Path, str]], arguments: list[str]) -> Outcome:
    """A disk changes as the first rank begins a step (counted from 1)."""
    seed_step = loop.seed_step

    def seed_and_remount(seed: int, step: int, rank: int) -> None:
        if rank == 0 and step + 1 in at_steps:
            remount(*at_steps[step + 1])
        seed_step(seed, step, rank)

    with replaced(loop, "seed_step", seed_and_remount):
        return run_here(arguments)


def test_a_disk_that_is_full_for_a_while(config: Path, waiting: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with small_disk(checkpoints_of(run), kib=100) as disk:
        arguments = ["train", "--run-dir", str(run), str(config), SPLIT]
        outcomes = on_ranks(2, train_with_remount, {13: (disk, "size=10m")}, arguments)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
        assert "step-00000010 could not be written" in outcomes[0].err
        assert "No space left on device" in outcomes[0].err
        assert (steps_of(run), leftovers_of(run)) == ([5, 15, 20], [])
        assert_same_checkpoints(run, waiting, [5, 15, 20])


def test_a_disk_that_stays_read_only(config: Path, waiting: Path, tmp_path: Path) -> None:
    """The run ends cleanly, its last good checkpoint is intact, and it goes on where the disk can be written again."""
    run = tmp_path / "run"
    with small_disk(checkpoints_of(run), kib=10_000) as disk:
        arguments = ["train", "--run-dir", str(run), str(config), SPLIT, "train.checkpoint_failures_allowed=1"]
        outcomes = on_ranks(2, train_with_remount, {8: (disk, "ro")}, arguments)
        assert [outcome.code for outcome in outcomes] == [2, 2]
        for part in ("Read-only file system", "2 in a row", "train.checkpoint_failures_allowed=1", "--resume"):
            assert part in outcomes[0].err
        assert newest_good_checkpoint(run) == (checkpoints_of(run) / "step-00000005", [])
        remount(disk, "rw")
        succeed(2, "train", "--resume", run)
        assert_same_checkpoints(run, waiting, [5, 10, 15, 20])
        assert losses_of(run).tolist() == losses_of(waiting).tolist()


def train_until_death(at_step: int, arguments: list[str]) -> None:
    """The second rank is gone in the middle of writing its experts."""
    write = checkpoint_saver.write_tensors

    def die(path: Path, tensors: Any) -> str:
        if f"step-{at_step:08d}" in str(path) and os.environ["RANK"] == "1":
            path.write_bytes(b"half of it")
            os._exit(9)
        return write(path, tensors)

    checkpoint_saver.write_tensors = die  # the processes are not used again
    run_here(arguments)


def test_a_rank_that_dies_while_it_writes(config: Path, waiting: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pool = RankPool(2)
    with pytest.raises(AssertionError, match="rank"):
        pool.run(train_until_death, (10, ["train", "--run-dir", str(run), str(config), SPLIT]))
    pool.close()
    assert steps_of(run) == [5]
    assert leftovers_of(run) == [".step-00000010.partial"]
    succeed(2, "train", "--resume", run)
    assert leftovers_of(run) == []
    assert_same_checkpoints(run, waiting, [5, 10, 15, 20])
    assert losses_of(run).tolist() == losses_of(waiting).tolist()


def test_what_a_killed_run_left_half_written_goes(config: Path, waiting: Path, tmp_path: Path) -> None:
    """Also where it belongs to a step that the resumed run does not save again."""
    run = tmp_path / "run"
    shutil.copytree(waiting, run)
    (checkpoints_of(run) / ".step-00000013.partial").mkdir()
    succeed(1, "train", "--resume", run, "parallel.expert_parallel_size=1")
    assert leftovers_of(run) == []


def test_best_weights_are_saved_beside_the_training_too(config: Path, tmp_path: Path) -> None:
    best: Callable[[Path], Path] = lambda run: complete_directories(run / "best")[-1]  # noqa: E731
    for mode in ("true", "false"):
        train = ["train.patience=2", "train.validate_every=4", f"train.async_checkpoints={mode}"]
        succeed(2, "train", "--run-dir", tmp_path / mode, config, SPLIT, *train)
    one, other = (best(tmp_path / mode) for mode in ("true", "false"))
    assert one.name == other.name
    for file in one.glob("*.safetensors"):
        assert file.read_bytes() == (other / file.name).read_bytes()
    ours, theirs = tensors_of(tmp_path / "true"), tensors_of(tmp_path / "false")
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def save_with_callbacks(root: Path) -> dict[str, Any]:
    """What callbacks hold changes once a checkpoint has been asked for, and its thread has not begun."""
    states = {"search": {"moves": [1, 2], "best": 0.5}}
    begin = threading.Event()
    write = checkpoint_saver.write_tensors

    def wait_and_write(path: Path, tensors: Any) -> str:
        assert begin.wait(timeout=20)
        return write(path, tensors)

    section = {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    with (
        process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=1)) as groups,
        toy_engine(groups, 4, **section) as engine,
        replaced(checkpoint_saver, "write_tensors", wait_and_write),
    ):
        saver = checkpoint_saver.CheckpointSaver(engine, in_background=True, failures_allowed=0, say=print)
        saver.save(root, 3, 1, TrainingHistory({2: 0.25}, 7.0), states)
        states["search"]["moves"].append(3)
        begin.set()
        saver.finish()
        loaded = load_checkpoint(engine, root / "step-00000003")
        assert loaded.history == TrainingHistory({2: 0.25}, 7.0)
        return loaded.callbacks


def test_what_callbacks_hold_is_in_the_checkpoint(tmp_path: Path) -> None:
    assert on_ranks(1, save_with_callbacks, tmp_path) == [{"search": {"moves": [1, 2], "best": 0.5}}]
