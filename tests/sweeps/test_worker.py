"""A worker's trials: together, alone, failing, breaking the runner's promise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.sweeps import Report, TrialResult
from dist_moe.sweeps.runner import TrialRunner

from . import runners
from .conftest import SWEEP, Bench

TOP_K = {"rows": {"Top-k": SWEEP["rows"]["Top-k"]}}


def test_trials_are_trained_together(bench: Bench) -> None:
    sizes = []

    def run(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
        sizes.append(len(configs))
        return runners.analytic(configs, report)

    studies = bench.studies(**TOP_K, trials=5)
    bench.work(studies, run, together=3)
    assert sizes == [3, 2]
    assert [record.state for record in studies.records("Top-k")] == ["complete"] * 5


def test_every_trial_is_told_its_own_result(bench: Bench) -> None:
    studies = bench.studies(**TOP_K, trials=3)
    bench.work(studies, runners.analytic, together=3)
    row = studies._plan.rows[0]
    for record in studies.records("Top-k"):
        config = row.config(bench.directory.base, row.values(row.draw(0, record.index)))
        assert record.val["loss"] == runners.loss_of(config)


def test_what_fails_together_is_trained_alone(bench: Bench) -> None:
    studies = bench.studies(**TOP_K, trials=5)
    bench.work(studies, runners.failing_together, together=4)
    for record in studies.records("Top-k"):
        fails = record.params["model.experts.dropout"] > 0.3
        assert record.state == ("failed" if fails else "complete")
        assert record.error == ("MemoryError: too large" if fails else "")
    assert {record.state for record in studies.records("Top-k")} == {"failed", "complete"}


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (runners.failing, "RuntimeError: the disk is full"),
        (runners.breaking_its_promise, "RuntimeError: the runner gave no result for a trial that was not to stop"),
        (lambda configs, report: [], "RuntimeError: the runner gave 0 results for 1 trials"),
        (
            lambda configs, report: [TrialResult({"auc": 1.0}, {}, 1)],
            "RuntimeError: the runner's validation metrics have no 'loss': ['auc']",
        ),
    ],
)
def test_a_failure_is_kept_with_its_message(bench: Bench, run: TrialRunner, error: str) -> None:
    studies = bench.studies(**TOP_K, trials=2)
    news = bench.work(studies, run)
    assert [(record.state, record.error) for record in studies.records("Top-k")] == [("failed", error)] * 2
    assert [(one.error, one.done, one.failed) for one in news] == [(error, 1, 1), (error, 2, 2)]
    stored = studies._studies["Top-k"].trials[0].user_attrs["failure"]["traceback"]
    assert stored.startswith("Traceback")


def test_failed_trials_are_tried_again_on_request_only(bench: Bench) -> None:
    bench.work(bench.studies(**TOP_K), runners.failing)
    assert bench.studies(**TOP_K).left() == 0
    studies = bench.studies(retry_failed=True, **TOP_K)
    assert len(bench.work(studies, runners.analytic)) == 3
    records = studies.records("Top-k")
    assert [record.params for record in records] == [studies._plan.rows[0].draw(0, i) for i in range(3)]
    assert {record.state for record in records} == {"complete"}


def test_news_count_the_row_and_name_its_best(bench: Bench) -> None:
    studies = bench.studies(trials=3)
    news = [one for one in bench.work(studies, runners.analytic) if one.row == "COMET"]
    losses = [record.loss for record in studies.records("COMET")]
    assert [one.done for one in news] == [1, 2, 3]
    assert [one.best for one in news] == [min(losses[: i + 1]) for i in range(3)]
    assert news[0].what == f"val loss {losses[0]:.4f}"
