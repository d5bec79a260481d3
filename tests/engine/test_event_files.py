"""TensorBoard's event files in the order in which they were begun, whatever the clocks of the machines say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dist_moe.engine.monitor.tensorboard import TensorBoardTracker
from tests.helpers.board import read_board, steps_of


def attempt(run: Path, first_step: int, last_step: int, loss: float) -> None:
    """Steps up to ``last_step``, after ``first_step`` that an earlier attempt has done."""
    tracker = TensorBoardTracker(run, first_step, print)
    for step in range(first_step + 1, last_step + 1):
        tracker.step({"step": step, "loss": loss})
    tracker.close()


@pytest.mark.parametrize("clocks", [(0.0, -3600.0, -7200.0), (0.0, 0.0, 0.0), (0.0, -0.5, 3600.0), (9e8, -9e8, 0.0)])
def test_abandoned_steps_are_hidden_and_new_ones_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clocks: tuple[float, ...]
) -> None:
    now = time.time()
    for clock, (first, last) in zip(clocks, ((0, 20), (10, 15), (5, 30)), strict=True):
        monkeypatch.setattr(time, "time", lambda clock=clock: now + clock)
        attempt(tmp_path, first, last, float(first))
    board = read_board(tmp_path)
    assert steps_of(board, "loss/task") == list(range(1, 31))
    shown = {event.step: event.value for event in board.Scalars("loss/task")}
    assert [shown[step] for step in (1, 5, 6, 15, 30)] == [0.0, 0.0, 5.0, 5.0, 5.0]
    walls = [event.wall_time for event in board.Scalars("loss/task")]
    assert walls == sorted(walls)


@pytest.mark.parametrize(
    "name", ["events.out.tfevents.", "events.out.tfevents.x.host", "events.out.tfevents.99999999999.h"]
)
def test_files_of_another_kind_are_in_nobody_s_way(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    attempt(tmp_path, 0, 3, 1.0)
    assert (tmp_path / name).stat().st_size == 0
