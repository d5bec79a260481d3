"""SQuAD v2 (Rajpurkar, Jia and Liang 2018, arXiv:1806.03822) in its official layout: train- and dev-v2.0.json.

No package carries it: a user's own copy is read. A question asks about a paragraph; its answers are pieces of that
paragraph, or it has none.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.published import PublishedData
from dist_moe.data.labelled_text.tasks import NO_PACKAGE
from dist_moe.errors import UserError, shown

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


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _AnswerEntry(_Strict):
    text: str
    answer_start: int


class _QuestionEntry(_Strict):
    id: str
    question: str
    is_impossible: bool
    answers: list[_AnswerEntry]


class _Paragraph(_Strict):
    context: str
    qas: list[_QuestionEntry]


class _Article(_Strict):
    paragraphs: list[_Paragraph]


class _File(_Strict):
    data: list[_Article]


def read_questions(file: File) -> list[Question]:
    """Return the questions of one official file, in its order. Raises `UserError`."""
    try:
        content = _File.model_validate_json(file.text())
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"]).removeprefix(".")
        raise UserError(f"{file.path}: {place or 'the file'}: {first['msg']}; expected SQuAD v2's layout") from error
    return [
        _question(entry, paragraph.context, f"{file.path}: data[{a}].paragraphs[{p}].qas[{q}]")
        for a, article in enumerate(content.data)
        for p, paragraph in enumerate(article.paragraphs)
        for q, entry in enumerate(paragraph.qas)
    ]


def _question(entry: _QuestionEntry, context: str, place: str) -> Question:
    if entry.is_impossible == bool(entry.answers):
        raise UserError(f"{place} has is_impossible={entry.is_impossible} and {len(entry.answers)} answer(s)")
    for number, answer in enumerate(entry.answers):
        start = answer.answer_start
        found = context[start : start + len(answer.text)] if start >= 0 else ""
        if found != answer.text or not found:
            raise UserError(
                f"{place}.answers[{number}]: at answer_start={start} the context has {shown(found)}, "
                f"not {shown(answer.text)}"
            )
    answers = tuple(Answer(answer.text, answer.answer_start) for answer in entry.answers)
    return Question(entry.id, entry.question, context, answers)


SQUAD_V2 = PublishedData(
    title="SQuAD v2",
    files=((TRAIN_FILE,), (DEV_FILE,)),
    read=lambda files, progress: (read_questions(files[0]), read_questions(files[1])),
    remedy=NO_PACKAGE.format(f"{TRAIN_FILE} and {DEV_FILE}"),
)
