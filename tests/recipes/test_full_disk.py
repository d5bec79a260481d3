"""A run whose own directory is full, its checkpoints on another disk: it goes on, and says what it could not record."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_moe.engine import training as loop
from dist_moe.engine.checkpoint.files import checkpoints_of, complete_directories
from dist_moe.recipes.supervised import recipe as supervised
from tests.helpers.board import read_board, steps_of
from tests.helpers.commands import Outcome, run_here, succeed
from tests.helpers.disks import fill, small_disk
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, records_of, summary_of, tensors_of, validations_of, write_config
from tests.recipes.test_saving import replaced

STEPS, FULL_AT, ROOM_AT = 60, 10, 50


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_data: dict[str, str]) -> Path:
    train = {"max_steps": STEPS, "checkpoint_every": 20, "log_every": 1, "validate_every": 15}
    return write_config(tmp_path_factory.mktemp("full"), tiny_data, train=train)


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> Path:
    succeed(1, "train", "--run-dir", config.parent / "undisturbed", config)
    return config.parent / "undisturbed"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """On a small disk of its own, its checkpoints on another one."""
    with small_disk(tmp_path / "run", kib=400) as run, small_disk(checkpoints_of(run), kib=10_000):
        yield run


def train_on_a_full_disk(run: Path, config: Path, room_at: int | None, room_for_summary: bool) -> Outcome:
    """The disk is full from FULL_AT on; there is room again at a step (counted from 1), or for the summary only."""
    seed_step, summarise = loop.seed_step, supervised.summarise
    filler = run / "filler"

    def seed(seed: int, step: int, rank: int) -> None:
        if step + 1 == FULL_AT:
            fill(run)
        if step + 1 == room_at:
            filler.unlink()
        seed_step(seed, step, rank)

    def make_room(*arguments: object) -> None:
        if room_for_summary:
            filler.unlink(missing_ok=True)
        summarise(*arguments)  # type: ignore[arg-type]

    with replaced(loop, "seed_step", seed), replaced(supervised, "summarise", make_room):
        return run_here(["train", "--run-dir", str(run), str(config)])


def events_of(run: Path) -> int:
    """By the lengths that stand before each."""
    count = 0
    for file in run.glob("events.out.tfevents.*"):
        content, place = file.read_bytes(), 0
        while place < len(content):
            place += struct.unpack_from("<Q", content, place)[0] + 16
            count += 1
        assert place == len(content)
    return count


def assert_trained_the_same(run: Path, undisturbed: Path, outcome: Outcome) -> None:
    for file in (run / "metrics.jsonl", run / "events.out.tfevents"):
        (warning,) = [line for line in outcome.err.splitlines() if f"{file}" in line and "ENOSPC" in line]
        assert "No space left on device" in warning
    assert [path.name for path in complete_directories(checkpoints_of(run))] == ["step-00000040", "step-00000060"]
    ours, theirs = tensors_of(run), tensors_of(undisturbed)
    assert [name for name in theirs if not ours[name].equal(theirs[name])] == []


def test_full_for_a_while(config: Path, undisturbed: Path, run: Path) -> None:
    (outcome,) = on_ranks(1, train_on_a_full_disk, run, config, ROOM_AT, False)
    assert outcome.code == 0, outcome.err
    assert_trained_the_same(run, undisturbed, outcome)
    assert [record["step"] for record in records_of(run)] == list(range(1, STEPS + 1))
    assert losses_of(run).tolist() == losses_of(undisturbed).tolist()
    assert validations_of(run) == validations_of(undisturbed)
    assert steps_of(read_board(run), "loss/task") == list(range(1, STEPS + 1))
    assert events_of(run) == events_of(undisturbed)
    assert summary_of(run)["lost_records"] == {"jsonl": 0, "tensorboard": 0}
    assert summary_of(run)["test"] == summary_of(undisturbed)["test"]


def test_full_to_the_end(config: Path, undisturbed: Path, run: Path) -> None:
    (outcome,) = on_ranks(1, train_on_a_full_disk, run, config, None, True)
    assert outcome.code == 0, outcome.err
    assert_trained_the_same(run, undisturbed, outcome)
    everything = {
        "jsonl": len(records_of(undisturbed)) + len(validations_of(undisturbed)),
        "tensorboard": events_of(undisturbed),
    }
    written = {"jsonl": len(records_of(run)) + len(validations_of(run)), "tensorboard": events_of(run)}
    lost = {name: everything[name] - written[name] for name in written}
    assert all(lost.values())
    assert summary_of(run)["lost_records"] == lost
    for number in lost.values():
        assert f"warning: {number} record(s) of {run}" in outcome.err


def test_no_room_for_the_summary(config: Path, undisturbed: Path, run: Path) -> None:
    """One message and exit code 2; there is nothing to train again when there is room."""
    (outcome,) = on_ranks(1, train_on_a_full_disk, run, config, None, False)
    assert outcome.code == 2
    for part in ("summary.json", "No space left on device", f"dist-moe train --resume {run}"):
        assert part in outcome.err
    (run / "filler").unlink()
    succeed(1, "train", "--resume", run)
    assert summary_of(run)["test"] == summary_of(undisturbed)["test"]
