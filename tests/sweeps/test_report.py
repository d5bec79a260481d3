"""The report says what the trials came to."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from dist_moe.cli.main import main
from dist_moe.errors import UserError
from dist_moe.sweeps.figure import group_of
from dist_moe.sweeps.paired import chosen_trials, paired_difference, reach_with_choice
from dist_moe.sweeps.records import State, TrialRecord, by_draw
from dist_moe.sweeps.report import reach_table, write_report
from dist_moe.sweeps.runner import TrialResult
from dist_moe.sweeps.study import Studies
from dist_moe.sweeps.summary import summarise, trials_to_reach

from . import runners
from .conftest import LR, Bench, Write

FILES = {"trials.csv", "table.md", "table.csv", "budget.csv", "budget.png"}
PAIRS = {"pairs.csv", "pairs.png"}


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def record(index: int, val: float, test: float, state: State = "complete", **others: float) -> TrialRecord:
    val = val if state == "complete" else math.inf
    return TrialRecord(index, state, {}, val, {"loss": val}, {"loss": test, **others}, 1, 1.0, "", "")


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Studies, Path]:
    bench = Bench(tmp_path_factory.mktemp("reported"))
    studies = bench.studies()
    bench.work(studies, runners.analytic)
    write_report(studies._plan, bench.directory, studies)
    return studies, bench.directory.report


def test_all_files_agree_with_the_studies(reported: tuple[Studies, Path]) -> None:
    studies, report = reported
    assert {path.name for path in report.iterdir()} == FILES
    trials = lines_of(report / "trials.csv")
    assert len(trials) == 6
    for line in trials:
        one = studies.records(line["row"])[int(line["trial"])]
        assert float(line["val_loss"]) == one.val["loss"]
        assert float(line["test_auc"]) == one.test["auc"]
        assert float(line[LR]) == one.params[LR]
        assert (line["model.gate.gamma"] == "") == (line["row"] == "Top-k")
    for line in lines_of(report / "table.csv"):
        best = sorted(studies.records(line["row"]), key=lambda one: one.loss)[:2]  # half of three, rounded up
        losses = [one.test["loss"] for one in best]
        assert int(line["averaged"]) == 2
        assert float(line["test_loss"]) == pytest.approx(statistics.mean(losses))
        every = [one.test["loss"] for one in studies.records(line["row"])]
        assert min(every) <= float(line["test_loss_low"]) <= float(line["test_loss"]) <= float(line["test_loss_high"])
        assert float(line["test_auc"]) == pytest.approx(statistics.mean(one.test["auc"] for one in best))
        assert float(line["best_test_loss"]) == losses[0]
    budgets = lines_of(report / "budget.csv")
    assert [(line["row"], line["number"]) for line in budgets] == [(r, n) for r in ("COMET", "Top-k") for n in "123"]
    for line in budgets:
        assert float(line["low_5"]) <= float(line["expected"]) <= float(line["high_95"])
        assert float(line["expected"]) == pytest.approx(float(line["expected_exact"]), rel=0.1)


def test_the_table_begins_with_how_it_was_made(reported: tuple[Studies, Path]) -> None:
    lines = (reported[1] / "table.md").read_text().splitlines()
    assert lines[0] == "# Sweep small"
    assert lines[2] == "- command: `dist-moe sweep small.yaml`"
    assert lines[3] == "- seed 0, sampler random, pruner none, 3 trials per row"
    assert lines[4].startswith("- date: 20")
    assert lines[5].startswith("- 6 trials on ")
    for part in ("cores", "GPU", "torch ", "optuna "):
        assert part in lines[5]
    assert "/" not in "".join(lines[2:6])
    row = next(line for line in lines if line.startswith("| Top-k |"))
    loss = lines_of(reported[1] / "table.csv")[1]
    span = f"({float(loss['test_loss_low']):.4f} to {float(loss['test_loss_high']):.4f})"
    assert f"{float(loss['test_loss']):.4f} {span} (of 2)" in row


def test_the_picture_is_one(reported: tuple[Studies, Path]) -> None:
    pixels = imread(reported[1] / "budget.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 800
    assert len({tuple(pixel) for pixel in pixels[::7, ::7, :3].reshape(-1, 3).tolist()}) > 5


def test_report_only_writes_it_anew(
    reported: tuple[Studies, Path], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    report = reported[1]
    before = (report / "table.md").read_text()
    (report / "table.md").unlink()
    capsys.readouterr()
    assert main(["sweep", str(write()), "--sweep-dir", str(report.parent), "--report-only"]) == 0
    assert (report / "table.md").read_text() == before == capsys.readouterr().out.removesuffix("\n")


def test_diverged_pruned_and_failed_trials_in_the_summary() -> None:
    records = [
        record(0, 0.3, 3.0, auc=0.5),
        record(1, math.inf, math.nan, "diverged"),
        record(2, 0.1, 1.0, auc=0.7),
        record(3, math.inf, math.nan, "pruned"),
        record(4, math.inf, math.nan, "failed"),
    ]
    (row,) = summarise({"A": records}, fraction=0.5, seed=0)
    assert row.trials == 4
    assert row.states == {"complete": 2, "diverged": 1, "pruned": 1, "failed": 1}
    assert (row.metrics["loss"], row.averaged) == (2.0, 2)
    assert row.metrics["auc"] == pytest.approx(0.6)
    assert row.best == records[2]
    assert row.exact is not None
    assert row.exact[0] == pytest.approx((3 + 3 + 1 + 3) / 4)  # without a result: the worst that there is


def test_trials_are_chosen_by_validation_alone() -> None:
    """The test loss says the opposite: neither means, nor the best trial, nor the budget curve go by it."""
    records = [record(i, val, 10 - val, auc=val) for i, val in enumerate((3.0, 1.0, 4.0, 2.0))]
    (row,) = summarise({"A": records}, fraction=0.5, seed=0)
    assert (row.metrics["loss"], row.metrics["auc"]) == (8.5, 1.5)
    assert row.best == records[1]
    assert row.exact is not None
    assert row.curve is not None
    for expected in (row.exact, row.curve.expected):
        assert expected[0] == pytest.approx(7.5, abs=0.1)
        assert 8.5 < expected[-1] < 9


def test_only_metrics_that_all_rows_have_are_compared() -> None:
    rows = {"A": [record(0, 1.0, 1.0, auc=0.5, mse=1.0)], "B": [record(0, 1.0, 1.0, auc=0.5, dead_experts=1.0)]}
    assert [list(row.metrics) for row in summarise(rows, 0.05, 0)] == [["loss", "auc"], ["loss", "auc"]]


def test_a_row_without_a_complete_trial_has_no_metrics() -> None:
    rows = {"A": [record(0, 1.0, 1.0)], "B": [record(0, math.inf, math.nan, "failed")], "C": []}
    summaries = summarise(rows, 0.05, 0)
    assert [row.best is None for row in summaries] == [False, True, True]
    assert trials_to_reach(summaries) == {"A": {"A": 1}}


def test_times_fewer_trials() -> None:
    """A's two trials of equal loss beat B's best at once; B reaches its own best late and A's never."""
    rows = {
        "A": [record(i, 0.1, 0.5) for i in range(2)],
        "B": [record(i, float(i), 1.0 + i) for i in range(40)],
    }
    reach = trials_to_reach(summarise(rows, 0.05, 0))
    assert reach["A"] == {"A": 1, "B": 1}
    assert reach["B"]["A"] is None
    assert reach["B"]["B"] is not None
    assert reach["B"]["B"] > 20


@pytest.mark.parametrize("together", [1, 3])
def test_a_budget_is_what_its_trials_computed(bench: Bench, together: int) -> None:
    """A stack's time is shared among its trials, so COMET's trials cost .1 s each, together or not."""
    studies = bench.studies(trials_together=together)
    bench.work(studies, runners.burning, together)
    text = write_report(studies._plan, bench.directory, studies)
    costs = {line["row"]: float(line["compute"]) for line in lines_of(bench.directory.report / "table.csv")}
    assert 0.1 <= costs["COMET"] < 0.2
    assert costs["Top-k"] < 0.1
    for line in lines_of(bench.directory.report / "budget.csv"):
        assert float(line["compute"]) == pytest.approx(int(line["number"]) * costs[line["row"]], abs=1e-3)
    reach = next(line for line in text.splitlines()[::-1] if line.startswith("| COMET |"))
    assert "3 (1.00)" in reach  # its own loss, after all its trials


def test_a_row_and_its_plus_are_drawn_alike() -> None:
    assert [group_of(name) for name in ("Top-k", "Top-k+", "Hash-r +", "C+ (swap)")] == [
        "Top-k",
        "Top-k",
        "Hash-r",
        "C",
    ]


def test_a_result_that_is_not_finite_survives_the_database(bench: Bench) -> None:
    studies = bench.studies()
    (taken,) = studies.take("one", 1)
    studies.tell_result(taken, TrialResult({"loss": math.nan}, {"loss": math.inf}, 1), "", 1.0)
    (one,) = studies.records("COMET")
    assert math.isnan(one.val["loss"])
    assert one.test == {"loss": math.inf}
    assert "1 diverged" in write_report(studies._plan, bench.directory, studies)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--report-only"], ["holds no sweep to report", "studies.db"]),
        (["--workers", "0"], ["--workers 0", "at least one"]),
        (["--runner", "nothing"], ["--runner 'nothing'", "module:function"]),
        (["--runner", "absent.module:f"], ["--runner absent.module:f", "cannot be imported"]),
        (["--runner", "math:absent"], ["--runner math:absent", "has no function absent"]),
        (["--runner", "math:pi"], ["has no function pi"]),
    ],
)
def test_wrong_arguments(
    write: Write, tmp_path: Path, arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write()), "--sweep-dir", str(tmp_path / "new"), *arguments]) == 2
    said: Any = capsys.readouterr()
    assert all(part in said.err for part in parts), said.err
    assert not (tmp_path / "new").exists()


def test_without_compute_there_is_no_share_of_it() -> None:
    free = [replace(record(i, 1.0, 1.0), compute=0.0) for i in range(2)]
    (row,) = summarise({"A": free}, 0.05, 0)
    assert "| A | 1 |" in reach_table("trial", [row])


def test_trials_that_diverged_count_as_the_worst_in_the_mean_too() -> None:
    records = [record(0, 0.5, 0.5), *(record(i, math.inf, math.nan, "diverged") for i in range(1, 40))]
    (row,) = summarise({"A": records}, 0.05, 0)
    assert (row.metrics["loss"], row.spread) == (0.5, (0.5, 0.5))


def test_nothing_to_report_yet(bench: Bench, write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    bench.studies()
    assert main(["sweep", str(write()), "--sweep-dir", str(bench.directory.root), "--report-only"]) == 2
    assert "no trial of" in capsys.readouterr().err


def test_a_directory_that_cannot_be_made(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    arguments = ["--sweep-dir", str(tmp_path / "file"), "--runner", "tests.sweeps.runners:analytic"]
    assert main(["sweep", str(write()), *arguments]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_rows_are_compared_seed_by_seed(bench: Bench) -> None:
    """Seeds differ by 1, rows and draws by far less: only pairs show that."""
    studies = bench.studies(trials=9, seeds=3, draws="common", compared=["loss", "auc"])
    bench.work(studies, runners.seeded)
    text = write_report(studies._plan, bench.directory, studies)
    chosen = {}
    for row in ("COMET", "Top-k"):
        records = studies.records(row)
        draws = [records[i : i + 3] for i in range(0, 9, 3)]
        assert all(one.params == draw[0].params for draw in draws for one in draw)
        chosen[row] = min(draws, key=lambda draw: sum(one.loss for one in draw))
    assert chosen["COMET"][0].params[LR] == chosen["Top-k"][0].params[LR]
    assert "3 draws (common) x 3 seeds" in text
    assert imread(bench.directory.report / "pairs.png").shape[1] > 500
    assert "| row | loss | auc | loss, with the choice |" in text
    (loss,) = (line for line in lines_of(bench.directory.report / "pairs.csv") if line["metric"] == "loss")
    pairs = zip(chosen["COMET"], chosen["Top-k"], strict=True)
    differences = [one.test["loss"] - other.test["loss"] for one, other in pairs]
    reach = 4.302653 * statistics.stdev(differences) / math.sqrt(3)  # Student's t, 2 degrees of freedom
    assert float(loss["mean"]) == pytest.approx(statistics.mean(differences), abs=1e-12)
    assert float(loss["high"]) - float(loss["low"]) == pytest.approx(2 * reach, rel=1e-5, abs=1e-12)
    with pytest.raises(
        UserError, match=r"compared=\['aucc'\]: not all seeds of row 'COMET' have a metric aucc; known: auc, loss"
    ):
        write_report(
            bench.studies(trials=9, seeds=3, draws="common", compared=["aucc"])._plan, bench.directory, studies
        )


def test_an_interval_with_the_choice_of_draws_in_it() -> None:
    """B's two draws are alike in validation but not in test: which one a search chooses, hangs on the seeds it has."""
    val, test = [[1.0, 2.0], [2.0, 1.01]], [[5.0, 5.0], [9.0, 9.0]]
    first = [record(i, 1.0 + i, 5.0) for i in range(4)]
    other = [record(2 * d + s, val[d][s], test[d][s]) for d in range(2) for s in range(2)]
    shifted = [record(i, 1.0 + i, 6.0) for i in range(4)]
    reach = reach_with_choice({"A": first, "B": other, "C": shifted, "D": first[:2], "E": []}, 2, common=True)
    assert reach == {"B": pytest.approx(12.706 * math.sqrt(2) * 1.94, rel=0.05), "C": 0.0}
    assert chosen_trials(other, 2) == other[:2]  # whose interval alone would be 0 to 0
    assert reach_with_choice({"A": first[:2], "B": other[:2]}, 2, common=True) == {}  # a draw: no choice


def test_where_the_choice_changes_nothing_the_interval_is_students() -> None:
    noise = [0.3, -0.1, 0.2, 0.5, -0.4]
    first = [record(i, 1.0 + i // 5, 1.0) for i in range(10)]
    other = [record(i, 1.0 + i // 5, 1.0 + noise[i % 5]) for i in range(10)]
    reach = reach_with_choice({"A": first, "B": other}, 5, common=True)["B"]
    alone = paired_difference(np.array(noise), np.zeros(5))
    assert reach == pytest.approx(alone.high - alone.mean, rel=0.05)


def test_common_draws_are_resampled_together() -> None:
    rows = {name: [record(i, float(i), float(i)) for i in range(4)] for name in ("A", "B")}
    assert reach_with_choice(rows, 2, common=True) == {"B": 0.0}
    assert reach_with_choice(rows, 2, common=False)["B"] > 1.0
    waits = rows | {"B": [rows["B"][i] for i in (0, 2, 3)], "C": [*rows["A"][:3], record(3, 1.0, 1.0, "failed")]}
    assert reach_with_choice(waits, 2, common=True) == {}


def test_one_draw_has_no_budget(bench: Bench) -> None:
    studies = bench.studies(trials=3, seeds=3, draws="common", space={})
    bench.work(studies, runners.seeded)
    text = write_report(studies._plan, bench.directory, studies)
    assert {path.name for path in bench.directory.report.iterdir()} == FILES - {"budget.csv", "budget.png"} | PAIRS
    assert "to reach" not in text
    assert " to " not in next(line for line in text.splitlines() if line.startswith("| COMET |"))


def test_a_draw_is_its_seeds_together() -> None:
    """Seed 1 of draw 0 is the best trial, draw 1 the best draw; a draw lasts until all its seeds are there."""
    trials = [record(0, 3.0, 30.0, auc=0.5), record(1, 1.0, 10.0, auc=0.7), record(2, 1.5, 15.0), record(3, 1.7, 17.0)]
    others = [record(4, 1.0, 1.0), record(5, 1.0, 1.0, "diverged"), record(6, 1.0, 1.0), record(7, 1.0, 1.0, "failed")]
    draws = by_draw([*trials, *others, record(8, 1.0, 1.0)], 2)
    assert [draw.state for draw in draws] == ["complete", "complete", "diverged", "failed"]
    assert (draws[0].loss, draws[0].test, draws[0].compute) == (2.0, {"loss": 20.0, "auc": 0.6}, 2.0)
    (row,) = summarise({"A": draws}, fraction=0.05, seed=0)
    assert (row.trials, row.averaged, row.metrics["loss"]) == (3, 1, 16.0)
    assert by_draw(trials, 1) == trials


def test_a_draw_with_a_seed_that_diverged_is_not_chosen() -> None:
    good, bad = [record(i, 2.0, 1.0) for i in (0, 1)], [record(2, 1.0, 1.0), record(3, 0.0, 1.0, "diverged")]
    assert chosen_trials([*bad, *good], 2) == good
    assert chosen_trials(bad, 2) == []


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [(1.0, "above"), (-1.0, "below"), (0.0, "within"), (math.nan, "unknown")],
)
def test_verdicts(shift: float, verdict: str) -> None:
    noise_N = np.array([0.1, -0.1, 0.2, -0.2])
    assert paired_difference(noise_N + shift, np.zeros(4)).verdict == verdict
