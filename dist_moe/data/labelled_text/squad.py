"""SQuAD v2 (Rajpurkar, Jia and Liang 2018, arXiv:1806.03822) in its official layout: train- and dev-v2.0.json.

No package carries it: a user's own copy is read. A question asks about a paragraph; its answers are pieces of that
paragraph, or it has none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import PublishedData
from dist_moe.data.fetch.tables import shown
from dist_moe.data.labelled_text.tasks import NO_PACKAGE
from dist_moe.errors import UserError

TRAIN_FILE, DEV_FILE = "train-v2.0.json", "dev-v2.0.json"


@dataclass(frozen=True)
class Answer:
    """An answer: the characters ``context[start : start + len(text)]`` of its question."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question about ``context``.

    ``answers``: those of several people, the first one to train on; none if the paragraph has no answer.
    """

    identity: str
    question: str
    context: str
    answers: tuple[Answer, ...]


def read_questions(file: File) -> list[Question]:
    """Return the questions of one official file, in its order. Raises `UserError`."""
    try:
        content = json.loads(file.text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file.path} is not JSON: {error}") from error
    reader = _Reader(file.path)
    return [
        reader.question(item, context, f"{place}.qas[{number}]")
        for article, where in reader.items(content, "data", "the file")
        for paragraph, place in reader.items(article, "paragraphs", where)
        for context in [reader.text(paragraph, "context", place)]
        for number, (item, _) in enumerate(reader.items(paragraph, "qas", place))
    ]


def _read_both(files: list[File], progress: Progress) -> tuple[list[Question], list[Question]]:
    train, dev = map(read_questions, files)
    return train, dev


SQUAD_V2 = PublishedData(
    title="SQuAD v2",
    files=((TRAIN_FILE,), (DEV_FILE,)),
    read=_read_both,
    remedy=NO_PACKAGE.format(f"{TRAIN_FILE} and {DEV_FILE}"),
)


class _Reader:
    """Takes values out of JSON; what is missing or of another type is named with its place in ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def question(self, item: Any, context: str, place: str) -> Question:
        """Return the question that ``item`` is, at ``place`` in the file. Raises `UserError`."""
        answers = tuple(self._answer(answer, context, where) for answer, where in self.items(item, "answers", place))
        impossible = self._value(item, "is_impossible", bool, place)
        if impossible == bool(answers):
            raise UserError(f"{self._path}: {place} has is_impossible={impossible} and {len(answers)} answer(s)")
        return Question(self.text(item, "id", place), self.text(item, "question", place), context, answers)

    def _answer(self, item: Any, context: str, place: str) -> Answer:
        answer = Answer(self.text(item, "text", place), self._value(item, "answer_start", int, place))
        found = context[answer.start : answer.start + len(answer.text)] if answer.start >= 0 else ""
        if found != answer.text or not found:
            raise UserError(
                f"{self._path}: {place}: at answer_start={answer.start} the context has {shown(found)}, "
                f"not {shown(answer.text)}"
            )
        return answer

    def items(self, parent: Any, name: str, place: str) -> list[tuple[Any, str]]:
        """Return the members of a list, each with its place."""
        values = self._value(parent, name, list, place)
        prefix = name if place == "the file" else f"{place}.{name}"
        return [(value, f"{prefix}[{number}]") for number, value in enumerate(values)]

    def text(self, parent: Any, name: str, place: str) -> str:
        """Return a text. Raises `UserError` if it is missing or no Unicode."""
        value = str(self._value(parent, name, str, place))
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{self._path}: {place}.{name} is no Unicode text: {error}") from error
        return value

    def _value(self, parent: Any, name: str, kind: type, place: str) -> Any:
        value = parent.get(name) if isinstance(parent, dict) else None
        if type(value) is not kind:
            raise UserError(f"{self._path}: {place} has no {name!r} of type {kind.__name__}, as SQuAD v2 has")
        return value
