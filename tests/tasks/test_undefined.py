"""Metrics without a value: null with a reason, told before the training, and no ground to choose by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.cli.main import main
from dist_moe.data.movielens import PairTable
from dist_moe.errors import UserError
from dist_moe.recipes.supervised.report import metrics_table
from dist_moe.tasks.evaluation import check_parts, check_selection, label_warnings, with_reasons
from dist_moe.tasks.labelled_text.question_answering import QuestionAnsweringTask
from dist_moe.tasks.recommendation import RecommendationTask
from dist_moe.tasks.recommendation.metrics import two_task_metrics
from tests.data.labelled_text.tiny_texts import write_messages
from tests.helpers.runs import summary_of
from tests.helpers.text_runs import write_encoder, write_text_config

BOTH = (0.5, 0.5)


def table(*rating_N: int) -> PairTable:
    zeros_N = np.zeros(len(rating_N), dtype=np.int32)
    return PairTable(zeros_N, zeros_N, np.array(rating_N, dtype=np.int8))


class Ratings(RecommendationTask):
    """Metrics of given labels; nothing of them is trained."""

    def __init__(self, train: PairTable, val: PairTable, test: PairTable) -> None:
        self.train, self.val, self.test = train, val, test


MIXED, WATCHED, UNRATED, EMPTY = table(3, 0, 5), table(1, 4), table(0, 0, 0), table()


def test_what_the_labels_leave_without_a_value_is_null_with_a_reason() -> None:
    task = Ratings(MIXED, WATCHED, UNRATED)
    for part, missing in ((task.train, set()), (task.val, {"auc"}), (task.test, {"auc", "mse"})):
        undefined = task.undefined(part, BOTH)
        predicted_N = np.full(len(part), 0.5)
        metrics = with_reasons(two_task_metrics(predicted_N, predicted_N, np.asarray(part.rating_N), BOTH), undefined)
        assert {name for name, value in metrics.items() if value is None} == missing
        assert metrics.get("undefined", {}).keys() == missing
        assert all("one class only" in reason for reason in metrics.get("undefined", {}).values())
        assert math.isfinite(metrics["loss"])
        json.dumps(metrics, allow_nan=False)


def test_a_metric_that_overflows_says_so_and_the_loss_stays_a_number() -> None:
    metrics = with_reasons({"loss": math.nan, "perplexity": math.inf, "bits_per_byte": 3.0}, {})
    assert metrics["perplexity"] is None
    assert math.isnan(metrics["loss"])
    assert metrics["undefined"] == {"loss": "the model's is nan", "perplexity": "the model's is inf"}
    assert metrics["bits_per_byte"] == 3.0


def test_the_table_on_the_screen_says_why() -> None:
    shown = metrics_table(with_reasons({"auc": math.nan, "bce": 0.5}, {"auc": "one class only"}), {})
    assert [line.split() for line in shown.splitlines()] == [
        ["auc", "bce"],
        ["this", "model", "-", "0.5000"],
        ["auc", "is", "undefined:", "one", "class", "only"],
    ]


def test_warnings_name_the_part_and_what_it_leaves_out() -> None:
    assert label_warnings(Ratings(MIXED, MIXED, MIXED), BOTH) == []
    train, test = label_warnings(Ratings(WATCHED, MIXED, UNRATED), BOTH)
    assert train == "warning: training examples: one class only, all pairs are watched; no auc"
    assert test == "warning: test examples: one class only, no pair is watched and rated; no auc, mse"


@pytest.mark.parametrize("weights", [BOTH, (0.0, 1.0), (1.0, 0.0)])
def test_nothing_is_chosen_by_a_loss_that_no_label_decides(weights: tuple[float, ...]) -> None:
    check_selection(Ratings(MIXED, MIXED, MIXED), weights, "the sweep")
    check_selection(Ratings(MIXED, WATCHED, MIXED), weights, "the sweep")
    task = Ratings(MIXED, UNRATED, MIXED)
    if weights[0]:
        check_selection(task, weights, "the sweep")
    else:
        with pytest.raises(UserError, match=r"the sweep chooses by the validation loss, which has no value: one class"):
            check_selection(task, weights, "the sweep")


@pytest.mark.parametrize(("place", "called"), [(0, "training"), (1, "validation"), (2, "test")])
def test_a_part_without_examples_is_refused(place: int, called: str) -> None:
    parts = [MIXED, MIXED, MIXED]
    parts[place] = EMPTY
    with pytest.raises(UserError, match=f"there are no {called} examples"):
        check_parts(Ratings(*parts))


def test_questions_of_one_kind_only() -> None:
    class Part:
        def __init__(self, *references: list[str]) -> None:
            self.references = references

    def undefined(part: Any) -> set[str]:
        return set(QuestionAnsweringTask.undefined(object.__new__(QuestionAnsweringTask), part, (1.0,)))

    assert undefined(Part(["a"], [])) == set()
    assert undefined(Part(["a"])) == {"exact_match_unanswerable", "f1_unanswerable"}
    assert undefined(Part([])) == {"exact_match_answered", "f1_answered"}


def test_texts_of_one_class_are_told_before_training_and_null_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = write_messages(tmp_path / "raw", count=60) / "sms-spam.csv"
    messages.write_text(messages.read_text().replace(",1,", ",0,"))
    data = {"name": "sms-spam", "root": str(messages.parent)}
    config = write_text_config(tmp_path, write_encoder(tmp_path / "encoder"), data)
    assert main(["train", str(config), "--run-dir", str(tmp_path / "run"), "train.max_steps=1"]) == 0
    said = capsys.readouterr()
    before, _, after = said.err.partition("step 1/1")
    assert "warning: training examples: one class only, ham; no matthews" in before
    assert "warning: training examples: no example is spam; no f1" in before
    assert "f1 undefined" in after
    assert "matthews is undefined: one class only, ham" in said.out
    summary = summary_of(tmp_path / "run")
    for metrics in (summary["test"], summary["val"], summary["baselines"]["constant"]):
        assert metrics["f1"] is metrics["matthews"] is None
        assert metrics["undefined"] == {"f1": "no example is spam", "matthews": "one class only, ham"}
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["test"] == summary["test"]
    assert again["baselines"] == summary["baselines"]
