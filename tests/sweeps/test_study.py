"""Trials change hands as they should: each is done once, with its own draw, whoever does it."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from dist_moe.errors import UserError
from dist_moe.sweeps import study as study_module
from dist_moe.sweeps.directory import SweepDirectory
from dist_moe.sweeps.plan import plan_sweep
from dist_moe.sweeps.records import DEATH_LIMIT, TrialRecord
from dist_moe.sweeps.runner import TrialResult
from dist_moe.sweeps.study import Studies

from . import runners
from .conftest import BASE, LR, SWEEP, TOP_K, Bench, Write

ROWS = ("COMET", "Top-k")


def draws(studies: Studies) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row, record.index): record.params for row in ROWS for record in studies.records(row)}


def only(studies: Studies) -> TrialRecord:
    (record,) = studies.records("Top-k")
    return record


def test_results_are_kept_with_all_metrics(bench: Bench) -> None:
    studies = bench.studies()
    bench.work(studies, runners.analytic, together=3)
    for row in ROWS:
        records = studies.records(row)
        assert [record.index for record in records] == [0, 1, 2]
        for record in records:
            loss = (math.log10(record.params[LR]) + 3) ** 2 + (record.params["model.experts.dropout"] - 0.2) ** 2 + 0.1
            assert record.state == "complete"
            assert record.val == pytest.approx({"loss": loss, "auc": 1 - loss})
            assert record.test == pytest.approx({"loss": 2 * loss, "auc": 0.9 - loss})
            assert (record.steps, record.loss) == (runners.STEPS, record.val["loss"])
            assert "torch" in record.environment


def test_draws_are_those_of_the_plan_whoever_trains_and_how_many_at_once(bench: Bench) -> None:
    studies = bench.studies(trials=5)
    while studies.left():
        for together in (1, 3, 2):  # three workers in turn
            bench.work(studies, runners.analytic, together, at_most=1)
    expected = {(row.name, index): row.draw(0, index) for row in studies._plan.rows for index in range(5)}
    assert draws(studies) == expected


def test_the_row_that_is_least_complete_comes_next(bench: Bench) -> None:
    studies = bench.studies()
    taken = [studies.take("a", 1)[0].row.name for _ in range(2)]
    assert taken == ["COMET", "Top-k"]
    assert [trial.row.name for trial in studies.take("a", 3)] == ["COMET", "COMET"]
    assert [trial.row.name for trial in studies.take("a", 3)] == ["Top-k", "Top-k"]
    assert studies.take("a", 3) == []


def test_a_sweep_goes_on_where_it_stopped(bench: Bench) -> None:
    first = bench.studies()
    bench.work(first, runners.analytic, at_most=2)
    done = [record for row in ROWS for record in first.records(row)]
    assert len(done) == 2
    second = bench.studies()
    assert len(bench.work(second, runners.analytic)) == 4
    after = [record for row in ROWS for record in second.records(row)]
    assert len(after) == 6
    assert all(record in after for record in done)


def test_trials_of_a_dead_worker_are_done_by_another_with_the_same_draw(bench: Bench) -> None:
    studies = bench.studies(**TOP_K)
    lost = studies.take("dead", 2)
    assert studies.release("another", died=True) == 0
    assert studies.release("dead", died=True) == 2
    bench.work(studies, runners.analytic)
    records = studies.records("Top-k")
    assert [record.index for record in records] == [0, 1, 2]
    assert [records[0].params, records[1].params] == [trial.trial.params for trial in lost]
    assert {record.state for record in records} == {"complete"}


def test_silence_is_death(bench: Bench) -> None:
    """Without anybody's release: the last heartbeat of the trial is long ago."""
    studies = bench.studies(**TOP_K, trials=1)
    silent = studies.take("silent", 1)
    with closing(sqlite3.connect(bench.directory.database)) as database, database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
    (again,) = bench.studies(**TOP_K, trials=1).take("another", 1)
    assert again.trial.params == silent[0].trial.params
    assert (again.index, again.trial.number) == (0, 1)


def test_heartbeats_keep_a_trial_with_its_worker(bench: Bench) -> None:
    studies = bench.studies(**TOP_K, trials=1)
    studies.take("alive", 1)
    assert bench.studies(**TOP_K, trials=1).take("another", 1) == []


def test_a_trial_taken_by_a_process_that_died_at_once_is_found(bench: Bench) -> None:
    """Between Optuna's ask and the first heartbeat there is nothing but the state."""
    studies = bench.studies(**TOP_K, trials=1)
    study = studies._studies["Top-k"]
    study.enqueue_trial({LR: 1e-3, "model.experts.dropout": 0.25}, user_attrs={"index": 0})
    with study_module._without_optunas_remarks():
        study.ask()
    (again,) = studies.take("another", 1)
    assert (again.index, again.values) == (0, {LR: 1e-3, "model.experts.dropout": 0.25})


def test_a_result_that_comes_after_another_took_over_is_dropped(bench: Bench) -> None:
    studies = bench.studies(**TOP_K, trials=1)
    (slow,) = studies.take("slow", 1)
    studies.release("slow", died=True)
    (again,) = studies.take("another", 1)
    assert not studies.tell_result(slow, TrialResult({"loss": 7.0}, {"loss": 7.0}, 1), "", 1.0)
    assert studies.tell_result(again, TrialResult({"loss": 1.0}, {"loss": 1.0}, 1), "", 1.0)
    assert only(studies).loss == 1.0


def test_a_trial_that_kills_its_workers_fails_in_the_end(bench: Bench) -> None:
    studies = bench.studies(**TOP_K, trials=1)
    for _ in range(DEATH_LIMIT):
        assert studies.records("Top-k") == []
        assert len(studies.take("dying", 1)) == 1
        studies.release("dying", died=True)
    assert studies.take("another", 1) == []
    assert (only(studies).state, only(studies).error) == ("failed", "the process that trained it died, 3 times")
    assert bench.studies(retry_failed=True, **TOP_K, trials=1).left() == 1


def test_interruptions_are_not_deaths(bench: Bench) -> None:
    studies = bench.studies(**TOP_K, trials=1)
    for _ in range(2 * DEATH_LIMIT):
        studies.take("interrupted", 1)
        studies.release("interrupted", died=False)
    assert studies.left() == 1


def test_an_attempt_given_up_but_not_queued_again_is_found_by_the_next_start(bench: Bench) -> None:
    studies = bench.studies(**TOP_K, trials=1)
    studies.take("dead", 1)
    studies._studies["Top-k"].tell(0, state=optuna.trial.TrialState.FAIL)
    assert studies.left() == 0
    assert studies.records("Top-k") == []
    assert bench.studies(**TOP_K, trials=1).left() == 1


def test_a_diverged_trial_is_complete_with_an_infinite_loss(bench: Bench) -> None:
    studies = bench.studies(trials=4)
    bench.work(studies, runners.diverging)
    records = [record for row in ROWS for record in studies.records(row)]
    diverged = [record for record in records if record.params["model.experts.dropout"] > 0.3]
    assert 0 < len(diverged) < len(records) == 8
    assert all((record.state, record.loss) == ("diverged", math.inf) for record in diverged)
    assert all(math.isnan(record.val["loss"]) for record in diverged)
    stored = studies._studies["Top-k"].get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len(stored) == 4


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_pruning_stops_trials(bench: Bench, pruner: str) -> None:
    studies = bench.studies(**TOP_K, pruner=pruner, trials=10)
    news = bench.work(studies, runners.analytic)
    records = studies.records("Top-k")
    pruned = [record for record in records if record.state == "pruned"]
    complete = [record for record in records if record.state == "complete"]
    assert len(pruned) >= 2
    assert len(complete) >= 2
    assert len(pruned) + len(complete) == 10
    assert all(record.loss == math.inf and record.test == {} for record in pruned)
    assert any(record.steps < runners.STEPS for record in pruned)
    assert sum(finished.what == "pruned" for finished in news) == len(pruned)


def test_tpe_looks_where_it_was_good(bench: Bench) -> None:
    """Its first ten trials are random."""
    studies = bench.studies(**TOP_K, trials=16, sampler="tpe")
    bench.work(studies, runners.analytic)
    losses = [record.loss for record in studies.records("Top-k")]
    assert sum(losses[10:]) / 6 < sum(losses[:10]) / 10


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"seed": 1}, ["seed was 0 and is 1"]),
        (
            {"space": {LR: {"log_uniform": [1e-4, 1e-3]}}},
            [f"space, {LR}, log_uniform was [0.0001, 0.01] and is [0.0001, 0.001]"],
        ),
        ({"base": BASE | {"seed": 3}}, ["base, seed was 'nothing' and is 3"]),
        ({"rows": {**SWEEP["rows"], "B": {}}}, ["rows, B, set was 'nothing' and is {}"]),
        ({"trials": 2}, ["trials=2 is less than the 3 with which it began"]),
    ],
)
def test_a_changed_sweep_is_refused(bench: Bench, change: dict[str, Any], parts: list[str]) -> None:
    bench.studies()
    with pytest.raises(UserError) as refusal:
        bench.studies(**change)
    for part in [*parts, "small.yaml", "ut it back as it was, or name another directory by --sweep-dir"]:
        assert part in str(refusal.value)


def test_a_sweep_may_grow_and_report_another_fraction(bench: Bench) -> None:
    bench.work(bench.studies(trials=1), runners.analytic)
    grown = bench.studies(trials=2, best_fraction=0.25)
    assert len(bench.work(grown, runners.analytic)) == 2
    assert draws(grown)[("COMET", 1)] == grown._plan.rows[0].draw(0, 1)


def test_files_that_are_no_studies_are_refused_by_name(write: Write, tmp_path: Path) -> None:
    plan, directory = plan_sweep(write()), SweepDirectory(tmp_path / "sweep")
    directory.create()
    directory.database.write_bytes(b"no data base, " * 500)
    with pytest.raises(UserError, match=r"studies\.db cannot be used"):
        Studies(directory, plan)
    assert directory.database.read_bytes() == b"no data base, " * 500


@pytest.mark.parametrize("name", ["studies.db", "base.yaml", "taking.lock", "report"])
def test_things_in_the_place_of_others_are_refused_by_name(tmp_path: Path, name: str) -> None:
    if name == "report":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is no .*move it away"):
        SweepDirectory(tmp_path).create()


def test_a_file_system_without_flock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match="without flock"), SweepDirectory(tmp_path).taking():
        pass


def test_the_file_of_studies_holds_json(bench: Bench) -> None:
    studies = bench.studies()
    (taken,) = studies.take("a", 1)
    studies.tell_result(taken, TrialResult({"loss": math.nan}, {"loss": math.inf}, 1), "", 1.0)
    with closing(sqlite3.connect(bench.directory.database)) as connection:
        values = [value for (value,) in connection.execute("select value_json from trial_user_attributes")]
    assert any("not_finite" in value for value in values)
    assert not any(word in value for value in values for word in ("NaN", "Infinity"))
