"""What is read of the files of each task: packages' files made here, GLUE's layouts from samples of our own making."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text import TASKS, TextTask
from dist_moe.data.labelled_text.tasks import (
    NEWSGROUPS,
    QUESTION_CLASSES,
    read_messages,
    read_newsgroups,
    read_questions,
    read_rating_signs,
    read_ratings,
)
from dist_moe.data.labelled_text.texts import LabelledTexts, Published
from dist_moe.errors import UserError
from tests.data.checks import files_in

from .tiny_texts import GLUE_FOLDERS, SAMPLES

SILENT = Progress(enabled=False)
RATINGS = 'id,sentiment,text\n1,2.5,"good, really"\n2,-0.1,bad\n3,0.0,so so\n4,-4,awful\n'


def file(content: str, name: str = "f.csv") -> File:
    raw = content.encode("latin-1")
    return File(Path(name), gzip.compress(raw) if name.endswith(".gz") else raw)


def test_ratings_and_their_signs() -> None:
    graded = read_ratings([file(RATINGS, "f.csv.gz")], SILENT).train
    assert graded.texts == [("good, really",), ("bad",), ("so so",), ("awful",)]
    assert graded.targets == [2.5, -0.1, 0.0, -4.0]
    signs = read_rating_signs([file(RATINGS)], SILENT)
    assert signs.train.texts == [("good, really",), ("bad",), ("awful",)]
    assert signs.train.targets == [1.0, 0.0, 0.0]
    assert (signs.left_out, signs.test) == ({"neutral": 1}, None)
    with pytest.raises(UserError, match=r"f\.csv, line 2: sentiment='4\.2'; expected a number from -4 to 4"):
        read_ratings([file("id,sentiment,text\n1,4.2,good\n")], SILENT)


def test_questions_by_coarse_class() -> None:
    content = "\n".join(f"{label}:any What is {label} in caf\xe9 ?" for label in QUESTION_CLASSES)
    published = read_questions([file(content + "\n")], SILENT).train
    assert published.targets == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert published.texts[2] == ("What is ENTY in caf\xe9 ?",)
    expected = "expected 'CLASS:subclass question' with CLASS one of ABBR"
    for line in ("THING:any What ?", "LOC:city", "What is this ?"):
        with pytest.raises(UserError, match=rf"f\.csv, line 2: .* {expected}"):
            read_questions([file(f"LOC:city Where ?\n{line}\n")], SILENT)


def test_messages() -> None:
    published = read_messages([file(',spam,text\nsms0,0,"hello, you"\nsms1!,1,WIN\n')], SILENT).train
    assert (published.texts, published.targets) == ([("hello, you",), ("WIN",)], [0.0, 1.0])


def test_newsgroups_keep_their_division() -> None:
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    train, test = (file(head + rows) for rows in ("sci.med\ta b\nrec.autos\t\n", "talk.religion.misc\tc\n"))
    published = read_newsgroups([train, test], SILENT)
    assert published.train.texts == [("a b",), ("",)]
    assert [NEWSGROUPS[int(x)] for x in published.train.targets] == ["sci.med", "rec.autos"]
    assert published.test is not None
    assert (published.test.texts, published.test.targets) == ([("c",)], [19.0])
    with pytest.raises(UserError, match=r"f\.csv, line 5: Category='sci\.fi'; allowed: alt\.atheism"):
        read_newsgroups([file(head + "sci.fi\ta\n"), test], SILENT)


SHOP = ("The shop opens at nine.", "The shop is closed at eight.")
LIBRARY = ("The mayor opened the new library on Monday .", "On Monday the new library was opened by the mayor .")
KNIFE = ("How do I sharpen a knife?", "What is the best way to sharpen a knife?")
CEILING = ("Who painted the ceiling?", "The ceiling was painted by two brothers.")
COUNCIL = ("The council, which met on Friday, raised the fee.", "The fee was raised.")
GLUE: dict[str, tuple[tuple[str, ...], float | str, float | str, tuple[int, int]]] = {
    "cola": (("The gardener watered the roses.",), "acceptable", "acceptable", (9, 3)),
    "sst-2": (("a warm and clever little film ",), "positive", "negative", (10, 2)),
    "mrpc": (LIBRARY, "equivalent", "different", (7, 2)),
    "sts-b": (("A boy throws a ball.", "A boy is throwing a ball."), 5.0, 2.4, (6, 3)),
    "qqp": (KNIFE, "duplicate", "different", (8, 2)),
    "mnli": (SHOP, "neutral", "neutral", (15, 3)),
    "mnli-mm": (SHOP, "neutral", "contradiction", (15, 2)),
    "qnli": (CEILING, "entailment", "not_entailment", (7, 2)),
    "rte": (COUNCIL, "entailment", "not_entailment", (9, 2)),
}
"""The first text to train on and its target, the last target to test on, and how many texts there are."""


def read(task: TextTask, root: Path) -> Published:
    return task.read(files_in(root, *(name for (name,) in task.files)), SILENT)


def target_of(task: TextTask, examples: LabelledTexts, row: int) -> float | str:
    target = examples.targets[row]
    return task.classes[int(target)] if task.classes else target


def test_every_task_without_a_package_has_a_sample() -> None:
    assert set(GLUE_FOLDERS) == {name for name, task in TASKS.items() if not task.remotes}


@pytest.mark.parametrize("name", GLUE_FOLDERS)
def test_the_columns_of(name: str) -> None:
    task = TASKS[name]
    published = read(task, SAMPLES / GLUE_FOLDERS[name])
    assert published.test is not None
    first, target, last, sizes = GLUE[name]
    assert (len(published.train), len(published.test)) == sizes
    assert (published.train.texts[0], target_of(task, published.train, 0)) == (first, target)
    assert target_of(task, published.test, -1) == last
    assert {len(text) for text in published.train.texts + published.test.texts} == {2 if task.has_pairs else 1}
    if task.classes:
        assert {int(target) for target in published.train.targets} == set(range(len(task.classes)))
    assert published.left_out == ({"broken_lines": 2} if name == "qqp" else {})


@pytest.mark.parametrize(
    ("name", "before", "after", "message"),
    [
        ("cola", "oo01\t1\t", "oo01\tyes\t", r"train\.tsv, line 1: label='yes'; allowed: 0, 1"),
        ("cola", "oo01\t1\t\t", "oo01\t1\t", r"line 1: 3 columns; expected 4: source, label, mark, sentence"),
        (
            "sst-2",
            "sentence\tlabel",
            "text\tlabel",
            r"has no column 'sentence'; its columns: 'text', 'label'",
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
