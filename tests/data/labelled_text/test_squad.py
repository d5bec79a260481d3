"""SQuAD v2's layout, read of a sample of our own making; whatever is wrong in it is named with its place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_moe.data.labelled_text.squad import DEV_FILE, TRAIN_FILE, Answer, Question
from dist_moe.errors import UserError

from .tiny_texts import SAMPLES, read_squad


def test_questions_and_their_answers() -> None:
    train, dev = read_squad(SAMPLES / "SQuAD")
    assert [len(question.answers) for question in train] == [1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1]
    assert [len(question.answers) for question in dev] == [2, 2, 0]
    assert train[2] == Question(
        "train003",
        "What did the lamp burn?",
        "The lighthouse of Orrin was built in 1874 by two sisters. Its lamp burned whale oil until 1911.",
        (Answer("whale oil", 74),),
    )
    assert len({question.identity for question in train}) == len(train)
    for question in train + dev:
        for answer in question.answers:
            assert question.context[answer.start :].startswith(answer.text)


def first(content: Any) -> Any:
    return content["data"][0]["paragraphs"][0]


def answer(content: Any, question: int) -> Any:
    return first(content)["qas"][question]["answers"][0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda x: answer(x, 1).update(answer_start=46),
            r"data\[0\]\.paragraphs\[0\]\.qas\[1\]\.answers\[0\]: at answer_start=46 .* not 'two sisters'",
        ),
        (lambda x: answer(x, 1).update(answer_start=-1), "answer_start=-1 the context has '', not 'two sisters'"),
        (lambda x: answer(x, 0).update(text="", answer_start=999), "answer_start=999 the context has '', not ''"),
        (lambda x: first(x).pop("context"), r"data\[0\]\.paragraphs\[0\]\.context: Field required"),
        (
            lambda x: answer(x, 0).update(answer_start="37"),
            r"qas\[0\]\.answers\[0\]\.answer_start: Input should be a valid integer",
        ),
        (lambda x: first(x).update(context="a\ud800"), "the file: Invalid JSON: .*hex escape"),
        (lambda x: first(x)["qas"][3].update(is_impossible=False), r"qas\[3\] has is_impossible=False and 0 answer"),
        (lambda x: first(x)["qas"][0].pop("is_impossible"), r"qas\[0\]\.is_impossible: Field required"),
        (lambda x: x.update(data=x["data"][0]), "data: Input should be a valid array; expected SQuAD v2's layout"),
    ],
)
def test_another_layout_is_named(tmp_path: Path, spoil: Callable[[Any], None], message: str) -> None:
    for name in (TRAIN_FILE, DEV_FILE):
        content = json.loads((SAMPLES / "SQuAD" / name).read_text())
        if name == TRAIN_FILE:
            spoil(content)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{TRAIN_FILE}: .*{message}"):
        read_squad(tmp_path)


def test_a_missing_and_a_torn_file(tmp_path: Path) -> None:
    (tmp_path / TRAIN_FILE).write_text('{"data": [')
    with pytest.raises(UserError, match=f"has no {DEV_FILE}"):
        read_squad(tmp_path)
    (tmp_path / DEV_FILE).write_text("{}")
    with pytest.raises(UserError, match=f"{TRAIN_FILE}: the file: Invalid JSON"):
        read_squad(tmp_path)
