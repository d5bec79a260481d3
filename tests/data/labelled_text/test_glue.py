"""GLUE's layouts, read of samples of our own making: the right columns, the right classes, faults named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text import TASKS, TextTask
from dist_moe.data.labelled_text.texts import LabelledTexts, Published
from dist_moe.errors import UserError

from .tiny_texts import GLUE_FOLDERS, SAMPLES

FIRST: dict[str, tuple[tuple[str, ...], float | str]] = {
    "cola": (("The gardener watered the roses.",), "acceptable"),
    "sst-2": (("a warm and clever little film ",), "positive"),
    "mrpc": (
        (
            "The mayor opened the new library on Monday .",
            "On Monday the new library was opened by the mayor .",
        ),
        "equivalent",
    ),
    "sts-b": (("A boy throws a ball.", "A boy is throwing a ball."), 5.0),
    "qqp": (("How do I sharpen a knife?", "What is the best way to sharpen a knife?"), "duplicate"),
    "mnli": (("The shop opens at nine.", "The shop is closed at eight."), "neutral"),
    "mnli-mm": (("The shop opens at nine.", "The shop is closed at eight."), "neutral"),
    "qnli": (("Who painted the ceiling?", "The ceiling was painted by two brothers."), "entailment"),
    "rte": (("The council, which met on Friday, raised the fee.", "The fee was raised."), "entailment"),
}
LAST_TESTED: dict[str, float | str] = {
    "cola": "acceptable",
    "sst-2": "negative",
    "mrpc": "different",
    "sts-b": 2.4,
    "qqp": "different",
    "mnli": "neutral",
    "mnli-mm": "contradiction",
    "qnli": "not_entailment",
    "rte": "not_entailment",
}
SIZES = {
    "cola": (9, 3),
    "sst-2": (10, 2),
    "mrpc": (7, 2),
    "sts-b": (6, 3),
    "qqp": (8, 2),
    "mnli": (15, 3),
    "mnli-mm": (15, 2),
    "qnli": (7, 2),
    "rte": (9, 2),
}


def read(task: TextTask, root: Path) -> Published:
    return task.read([File(root / name, (root / name).read_bytes()) for (name,) in task.files], Progress(enabled=False))


def said(task: TextTask, examples: LabelledTexts, row: int) -> float | str:
    target = examples.targets[row]
    return task.classes[int(target)] if task.classes else target


def test_every_task_without_a_package_has_a_sample() -> None:
    assert set(GLUE_FOLDERS) == {name for name, task in TASKS.items() if not task.remotes}


@pytest.mark.parametrize("name", GLUE_FOLDERS)
def test_the_columns_of(name: str) -> None:
    task = TASKS[name]
    published = read(task, SAMPLES / GLUE_FOLDERS[name])
    assert published.test is not None
    assert (len(published.train), len(published.test)) == SIZES[name]
    assert (published.train.texts[0], said(task, published.train, 0)) == FIRST[name]
    assert said(task, published.test, -1) == LAST_TESTED[name]
    assert {len(text) for text in published.train.texts + published.test.texts} == {2 if task.has_pairs else 1}
    if task.classes:
        assert {int(target) for target in published.train.targets} == set(range(len(task.classes)))


def test_quotes_are_characters() -> None:
    published = read(TASKS["sst-2"], SAMPLES / "SST-2")
    assert published.train.texts[3] == ('a plot as thin as "paper" ',)


def test_broken_lines_of_qqp_are_counted() -> None:
    assert read(TASKS["qqp"], SAMPLES / "QQP").left_out == {"broken_lines": 2}
    assert read(TASKS["rte"], SAMPLES / "RTE").left_out == {}


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("cola", "oo01\t1\t", "oo01\tyes\t", r"train\.tsv, line 1: label='yes'; allowed: 0, 1"),
        (
            "cola",
            "oo01\t1\t\t",
            "oo01\t1\t",
            r"train\.tsv, line 1: 3 columns; expected 4: source, label, mark, sentence",
        ),
        (
            "sst-2",
            "sentence\tlabel",
            "text\tlabel",
            r"train\.tsv has no column 'sentence'; its columns: 'text', 'label'",
        ),
        ("mrpc", "#2 String", "Second", r"train\.tsv has no column '#2 String'"),
        ("sts-b", "\t5.000", "\t5.500", r"train\.tsv, line 2: score='5\.500'; expected a number from 0 to 5"),
        ("qqp", "is_duplicate", "same", r"train\.tsv has no column 'is_duplicate'"),
        ("mnli", "\tneutral\tneutral", "\tneutral\t-", r"train\.tsv, line 2: gold_label='-'; allowed: contradiction"),
        ("qnli", "question", "query", r"train\.tsv has no column 'question'"),
        ("rte", "\tentailment", "\t1", r"train\.tsv, line 2: label='1'; allowed: entailment, not_entailment"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, name: str, before: str, after: str, message: str) -> None:
    root = tmp_path / "copy"
    shutil.copytree(SAMPLES / GLUE_FOLDERS[name], root)
    content = (root / "train.tsv").read_text(encoding="utf-8")
    assert before in content
    (root / "train.tsv").write_text(content.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(TASKS[name], root)
