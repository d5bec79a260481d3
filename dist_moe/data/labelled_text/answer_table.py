"""Windows of questions as examples for a model, and the texts that their tokens stand for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_moe.data.labelled_text.squad import Question
from dist_moe.data.labelled_text.table import LabelledTable


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
        """What the context has where the tokens ``start`` to ``end`` (included) of a window's row stand."""
        context: str = self._texts["contexts"][self._texts["context_of"][self.question_N[window]]]
        row = self.start_P[window]
        return context[self.place_M2[row + start, 0] : self.place_M2[row + end, 1]]


def written(questions: Sequence[Question]) -> NDArray[np.uint8]:
    """Contexts and answers as bytes of JSON, each context once."""
    contexts = {context: number for number, context in enumerate(dict.fromkeys(q.context for q in questions))}
    content = {
        "contexts": list(contexts),
        "context_of": [contexts[question.context] for question in questions],
        "answers": [[answer.text for answer in question.answers] for question in questions],
    }
    return np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)
