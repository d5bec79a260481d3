"""Questions and the texts that they ask about as rows of tokens; of a long text, windows that overlap.

A row is [CLS] question [SEP] window [SEP]. A window is as long as a row allows, and shares its first tokens with the
one before. An answer is trained on where a window holds all of it; elsewhere, and where the text has none, [CLS] is
the answer (Devlin et al. 2019; Rajpurkar, Jia and Liang 2018).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from dist_moe.config.files import json_line
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text.squad import Answer, Question
from dist_moe.data.labelled_text.texts import TextOrPair
from dist_moe.data.labelled_text.tokens import LabelledTable, TokenisedTexts, encodings
from dist_moe.errors import UserError

NO_ANSWER = (0, 0)
"""[CLS], at which a window starts and ends that does not hold the answer."""


@dataclass(frozen=True)
class AnswerWindows:
    """N windows, those of a question one after the other.

    ``rows``: their tokens. ``question_N``: the number of the question. ``span_N2``: the first and the last token of
    the question's first answer, in the window's row; `NO_ANSWER` if the window does not hold it.
    ``place_M2``: the characters of the context that a token stands for, from and to; 0 of all other tokens.
    """

    rows: TokenisedTexts
    question_N: NDArray[np.int64]
    span_N2: NDArray[np.int64]
    place_M2: NDArray[np.int32]


def windows_of(
    tokenizer: Tokenizer, questions: list[Question], max_length: int, stride: int, part: str, progress: Progress
) -> AnswerWindows:
    """Cut questions into windows of rows of up to ``max_length`` tokens; neighbours share ``stride`` tokens.

    ``tokenizer``: one that cuts nothing. Raises `UserError` for a question that leaves no more than ``stride`` tokens
    for its text, and for a tokenizer that writes pairs in another way than BERT's.
    """
    ids, places = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)]
    first: list[int] = []
    numbers: list[int] = []
    spans: list[tuple[int, int]] = []
    texts: list[TextOrPair] = [(question.question, question.context) for question in questions]
    for number, encoding in enumerate(encodings(tokenizer, texts, part, progress)):
        head = _tokens_before_the_text(encoding)
        room = max_length - head - 1
        if room <= stride:
            raise UserError(
                f"data.max_length={max_length}: the question {questions[number].identity!r} has {head - 2} tokens, "
                f"which leaves {max(room, 0)} for its text, and windows are to share data.stride={stride} of them; "
                f"give a data.max_length of at least {head + 1 + stride + 1}, or a smaller data.stride"
            )
        token_M = np.array(encoding.ids, dtype=np.int32)
        place_C2 = np.array(encoding.offsets, dtype=np.int32)[head:-1]
        found = [_tokens_of(answer, place_C2) for answer in questions[number].answers[:1]]
        for begin in window_starts(len(place_C2), room, stride):
            end = min(begin + room, len(place_C2))
            ids.append(np.concatenate([token_M[:head], token_M[head + begin : head + end], token_M[-1:]]))
            places.append(np.pad(place_C2[begin:end], ((head, 1), (0, 0))))
            whole = [(head + a - begin, head + z - begin) for a, z in filter(None, found) if begin <= a and z < end]
            spans.append(whole[0] if whole else NO_ANSWER)
            numbers.append(number)
            first.append(head)
    return AnswerWindows(
        TokenisedTexts.of(ids[1:], first, 0),
        np.array(numbers, dtype=np.int64),
        np.array(spans, dtype=np.int64).reshape(-1, 2),
        np.concatenate(places),
    )


def window_starts(count: int, room: int, stride: int) -> Iterator[int]:
    """Yield where windows of ``room`` tokens begin in a text of ``count``, the last one reaching its end."""
    yield from range(0, max(count - stride, 1), room - stride)


def _tokens_of(answer: Answer, place_C2: NDArray[np.int32]) -> tuple[int, int] | None:
    """Return the first and the last token that has a character of the answer, if there is any."""
    begin_C, end_C = place_C2.T
    touched = np.flatnonzero((begin_C < answer.start + len(answer.text)) & (end_C > answer.start))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


def _tokens_before_the_text(encoding: Encoding) -> int:
    """Return how many [CLS], question and [SEP] are; raise `UserError` if a pair is written otherwise."""
    count = encoding.sequence_ids.count(1)
    head = len(encoding) - count - 1
    written = [None, *[0] * (head - 2), None, *[1] * count, None]
    if encoding.sequence_ids != written or encoding.type_ids != [0] * head + [1] * (count + 1):
        raise UserError(
            "data.tokenizer does not write a pair as [CLS] question [SEP] text [SEP], of types 0 and 1, as BERT's do; "
            "leave it out to have the encoder's own"
        )
    return head


@dataclass(frozen=True)
class AnswerTable(LabelledTable):
    """N windows of Q questions; see `AnswerWindows` for ``question_N`` and ``place_M2``.

    ``target_N``: int64 [N, 2], ``span_N2``. ``written_J``: the questions' texts, as `written` packs them.
    """

    question_N: NDArray[np.int64]
    place_M2: NDArray[np.int32]
    written_J: NDArray[np.uint8]

    @cached_property
    def _texts(self) -> dict[str, Any]:
        texts: dict[str, Any] = json.loads(self.written_J.tobytes())
        return texts

    @property
    def references(self) -> list[list[str]]:
        """The right answers to each question, none where its text has none."""
        answers: list[list[str]] = self._texts["answers"]
        return answers

    def text(self, window: int, start: int, end: int) -> str:
        """Return what the context has where the tokens ``start`` to ``end`` (included) of a window's row stand."""
        context: str = self._texts["contexts"][self._texts["context_of"][self.question_N[window]]]
        row = self.start_P[window]
        return context[self.place_M2[row + start, 0] : self.place_M2[row + end, 1]]


def written(questions: Sequence[Question]) -> NDArray[np.uint8]:
    """Return contexts and answers as bytes of JSON, each context once."""
    contexts = {context: number for number, context in enumerate(dict.fromkeys(q.context for q in questions))}
    content = {
        "contexts": list(contexts),
        "context_of": [contexts[question.context] for question in questions],
        "answers": [[answer.text for answer in question.answers] for question in questions],
    }
    return np.frombuffer(json_line(content).encode(), dtype=np.uint8)
