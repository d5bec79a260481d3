"""Exact match and F1 of answers: the official rules, case by case."""

from __future__ import annotations

import pytest

from dist_moe.tasks.labelled_text.answer_metrics import answer_f1, answer_metrics, exact_match, normalised


@pytest.mark.parametrize(
    ("answer", "compared"),
    [
        ("The  Beatles", "beatles"),
        ("an apple, a pear & the fig!", "apple pear fig"),
        ("theatre", "theatre"),
        ("a.b", "ab"),
        ("vitamin A", "vitamin"),
        ("the-end", "theend"),
        ("l\u2019an\u00e9e", "l\u2019an\u00e9e"),
        ("the", ""),
        (" \n", ""),
        ("$5.00", "500"),
    ],
)
def test_what_is_compared(answer: str, compared: str) -> None:
    assert normalised(answer) == compared


@pytest.mark.parametrize(
    ("predicted", "references", "exact", "f1"),
    [
        ("The 1874.", ["1874"], 1, 1),
        ("two sisters", ["sisters"], 0, 2 / 3),
        ("red red fox", ["red fox fox"], 0, 2 / 3),
        ("red red", ["red"], 0, 2 / 3),
        ("fox", ["wolf", "grey fox", "fox cub den"], 0, 2 / 3),
        ("fox", ["the fox", "wolf"], 1, 1),
        ("", [], 1, 1),
        ("fox", [], 0, 0),
        ("", ["fox"], 0, 0),
        ("the", ["fox"], 0, 0),
        ("the", [], 1, 1),
        ("", ["the", "fox"], 0, 0),
        ("", ["the", "..."], 1, 1),
        ("cat", ["dog"], 0, 0),
    ],
)
def test_the_best_reference_counts(predicted: str, references: list[str], exact: float, f1: float) -> None:
    assert exact_match(predicted, references) == exact
    assert answer_f1(predicted, references) == pytest.approx(f1)


def test_means_over_questions_with_and_without_an_answer() -> None:
    metrics = answer_metrics(["1874", "sisters", "", "whale"], [["1874"], ["two sisters"], [], []])
    assert metrics == pytest.approx(
        {
            "exact_match": 0.5,
            "f1": (1 + 2 / 3 + 1) / 4,
            "exact_match_answered": 0.5,
            "f1_answered": 5 / 6,
            "exact_match_unanswerable": 0.5,
            "f1_unanswerable": 0.5,
        }
    )
    assert set(answer_metrics([], []).values()) == {0}
    assert answer_metrics(["x"], [["x"]])["f1_unanswerable"] == 0
    with pytest.raises(ValueError, match="shorter"):
        answer_metrics(["x"], [])
