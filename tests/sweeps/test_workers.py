"""Worker processes that finish, die and are stopped; and what the command says of it."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from dist_moe.cli.main import main
from dist_moe.errors import UserError
from dist_moe.sweeps.command import _begin
from dist_moe.sweeps.plan import plan_sweep
from dist_moe.sweeps.study import Studies
from dist_moe.sweeps.worker import Finished
from dist_moe.sweeps.workers import Tally
from tests.helpers.commands import PATIENCE_S, finish, start

from . import runners
from .conftest import TOP_K, Bench, Write

RUNNERS = "tests.sweeps.runners"


def test_a_killed_worker_is_replaced_and_its_trial_is_done(
    write: Write,
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("DIST_MOE_TEST_GATE", str(tmp_path / "died"))
    root = bench.directory.root
    arguments = ["sweep", write(trials=2), "--sweep-dir", root, "--workers", 2, "--runner", f"{RUNNERS}:dying_once"]
    assert main([str(argument) for argument in arguments]) == 0
    said = capsys.readouterr()
    assert "a worker died (exit code -9); 1 trial(s) of it will be tried again" in said.err
    assert said.err.count("row 1/2 COMET: trial ") == said.err.count("row 2/2 Top-k: trial ") == 2
    assert said.out.strip() == (root / "report" / "table.md").read_text().strip()
    studies = bench.studies(trials=2)
    for row in studies._plan.rows:
        assert [record.params for record in studies.records(row.name)] == [row.draw(0, i) for i in range(2)]
        assert {record.state for record in studies.records(row.name)} == {"complete"}


def test_sigterm_ends_at_once_and_loses_nothing(
    write: Write, bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DIST_MOE_TEST_GATE", str(tmp_path / "gate"))
    path = write(**TOP_K)
    command = [sys.executable, "-m", "dist_moe", "sweep", path, "--sweep-dir", bench.directory.root]
    process = start(*command, "--runner", f"{RUNNERS}:slow")
    deadline = time.monotonic() + PATIENCE_S
    while not list(tmp_path.glob("waiting-*")):
        assert process.poll() is None, finish(process).err
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    outcome = finish(process)
    assert outcome.code == 128 + signal.SIGTERM
    assert f"stopped; 'dist-moe sweep {path}' goes on" in outcome.err
    assert "Traceback" not in outcome.err
    (waiting,) = tmp_path.glob("waiting-*")
    assert not Path(f"/proc/{waiting.name.partition('-')[2]}").exists()
    studies = bench.studies(**TOP_K)
    assert (studies.running(), studies.left()) == (0, 3)
    assert studies.take("next", 1)[0].trial.params == studies._plan.rows[0].draw(0, 0)


def test_after_everything_was_killed_the_next_start_finds_all_trials(write: Write, bench: Bench) -> None:
    bench.studies(**TOP_K).take("dead", 2)
    plan = plan_sweep(write(**TOP_K))
    with bench.directory.taking(), bench.directory.working() as alone:
        assert alone
        studies = Studies(bench.directory, plan)
        _begin(studies, plan, bench.directory, alone, retry_failed=False)
    assert studies.left() == 3
    assert len(bench.work(studies, runners.analytic)) == 3


def test_trials_of_living_processes_are_left_to_them(bench: Bench, write: Write) -> None:
    bench.studies(**TOP_K).take("alive", 2)
    plan = plan_sweep(write(**TOP_K))
    with bench.directory.working(), bench.directory.taking(), bench.directory.working() as alone:
        assert not alone
        studies = Studies(bench.directory, plan)
        _begin(studies, plan, bench.directory, alone, retry_failed=False)
    assert (studies.running(), studies.left()) == (2, 1)


def news(row: str, what: str = "val loss 0.5000", error: str = "", done: int = 2, failed: int = 0) -> Finished:
    return Finished(row, 1, what, error, done, failed, best=0.25)


def test_the_line_of_a_trial(write: Write) -> None:
    lines: list[str] = []
    tally = Tally(plan_sweep(write()), lines.append)
    tally.count(news("Top-k"))
    tally.count(news("COMET", "failed: OSError: full", "OSError: full", done=3, failed=2))
    assert lines == [
        "row 2/2 Top-k: trial 2/3 val loss 0.5000 (best 0.2500)",
        "row 1/2 COMET: trial 3/3 failed: OSError: full (best 0.2500), 2 failed",
    ]


def test_three_failures_of_a_row_in_succession_stop_the_sweep(write: Write) -> None:
    tally = Tally(plan_sweep(write()), lambda line: None)
    for _ in range(2):
        tally.count(news("COMET", error="OSError: full"))
        tally.count(news("Top-k", error="OSError: full"))
    tally.count(news("COMET"))  # a success: COMET counts from the beginning again
    for _ in range(2):
        tally.count(news("COMET", error="OSError: full"))
    with pytest.raises(UserError, match=r"row Top-k: 3 trials failed one after the other.*trial 1, with: Dice"):
        tally.count(news("Top-k", error="Dice"))


def test_three_deaths_in_succession_stop_the_sweep(write: Write) -> None:
    tally = Tally(plan_sweep(write()), lambda line: None)
    for _ in range(2):
        tally.count_death(-9, 1)
        tally.count_death(-9, 1)
        tally.count(news("COMET"))
    tally.count_death(-9, 1)
    tally.count_death(-9, 1)
    with pytest.raises(UserError, match=r"3 workers died one after the other \(exit code -9; .*fewer --workers"):
        tally.count_death(-9, 1)


def test_a_sweep_that_only_fails_ends_with_the_message(
    write: Write, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", str(write(trials=9, **TOP_K)), "--sweep-dir", str(bench.directory.root)]
    assert main([*arguments, "--runner", f"{RUNNERS}:failing"]) == 2
    said = capsys.readouterr()
    assert "dist-moe: row Top-k: 3 trials failed one after the other" in said.err
    assert "RuntimeError: the disk is full" in said.err
    assert said.out == ""
    studies = bench.studies(trials=9, **TOP_K)
    assert studies.running() == 0
    assert len(studies.records("Top-k")) < 9
