"""What is read of the packages' files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text.readers import (
    NEWSGROUPS,
    QUESTION_CLASSES,
    read_messages,
    read_newsgroups,
    read_questions,
    read_rating_signs,
    read_ratings,
)
from dist_moe.errors import UserError

SILENT = Progress(enabled=False)


def file(content: str, name: str = "f.csv") -> File:
    raw = content.encode("latin-1")
    return File(Path(name), gzip.compress(raw) if name.endswith(".gz") else raw)


RATINGS = 'id,sentiment,text\n1,2.5,"good, really"\n2,-0.1,bad\n3,0.0,so so\n4,-4,awful\n'


def test_ratings_and_their_signs() -> None:
    graded = read_ratings([file(RATINGS, "f.csv.gz")], SILENT).train
    assert graded.texts == [("good, really",), ("bad",), ("so so",), ("awful",)]
    assert graded.targets == [2.5, -0.1, 0.0, -4.0]
    signs = read_rating_signs([file(RATINGS)], SILENT)
    assert signs.train.texts == [("good, really",), ("bad",), ("awful",)]
    assert signs.train.targets == [1.0, 0.0, 0.0]
    assert (signs.left_out, signs.test) == ({"neutral": 1}, None)


def test_a_rating_out_of_range() -> None:
    with pytest.raises(UserError, match=r"f\.csv, line 2: sentiment='4\.2'; expected a number from -4 to 4"):
        read_ratings([file("id,sentiment,text\n1,4.2,good\n")], SILENT)


def test_questions_by_coarse_class() -> None:
    content = "\n".join(f"{label}:any What is {label} in caf\xe9 ?" for label in QUESTION_CLASSES)
    published = read_questions([file(content + "\n")], SILENT).train
    assert published.targets == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert published.texts[2] == ("What is ENTY in caf\xe9 ?",)


@pytest.mark.parametrize("line", ["THING:any What ?", "LOC:city", "What is this ?"])
def test_a_line_that_is_no_labelled_question(line: str) -> None:
    with pytest.raises(
        UserError, match=r"f\.csv, line 2: .* expected 'CLASS:subclass question' with CLASS one of ABBR"
    ):
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
