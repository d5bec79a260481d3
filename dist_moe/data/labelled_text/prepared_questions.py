"""SQuAD v2 for a model: a user's copy of it, split and cut into windows once, memory-mapped ever after.

The answers of its official test part are not published: the development file is the test part here. Validation is a
tenth of the contexts of the training file with all their questions, so that no text is in two parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from dist_moe.data.digests import digest_of_content
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import Located
from dist_moe.data.labelled_text.answers import AnswerTable, AnswerWindows, windows_of, written
from dist_moe.data.labelled_text.squad import SQUAD_V2, Question
from dist_moe.data.labelled_text.texts import identity
from dist_moe.data.labelled_text.tokens import TokenisedSettings, padding_of, tokenizer_digest, tokens_digest
from dist_moe.data.prepared import PARTS, Prepared, by_part, prepare_data, split_off_tenths
from dist_moe.data.tokenizer_files import ids_of
from dist_moe.errors import UserError

FORMAT_VERSION = 3
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""


class QuestionsConfig(TokenisedSettings):
    """Questions whose answers are pieces of a text, and where their files are."""

    name: Literal["squad-v2"] = Field(default="squad-v2", description="SQuAD v2, which needs data.root.")
    root: Path | None = Field(
        default=None, description="Directory with train-v2.0.json and dev-v2.0.json; no package carries them."
    )
    max_length: int = Field(
        default=384,
        ge=8,
        description="Tokens of a question and a window of its text, special ones included; longer texts have several.",
    )
    stride: int = Field(default=128, ge=0, description="Tokens of a text that two neighbouring windows share.")
    longest_answer: int = Field(default=30, ge=1, description="Tokens that a predicted answer may have.")
    seed: int = Field(default=0, ge=0, description="Seed of the split.")

    @model_validator(mode="after")
    def _windows_move_on(self) -> Self:
        limit = self.max_length - 4  # [CLS], [SEP], [SEP] and one token that is new
        if self.stride > limit:
            raise ValueError(
                f"stride={self.stride}: a window of max_length={self.max_length} tokens can share at most {limit} with "
                "the one before; give a smaller stride or a larger max_length"
            )
        return self

    def check(self) -> None:
        """Raise `UserError` where no file needs to be looked at to see that there is none."""
        SQUAD_V2.check(self.root)

    def fetch(self, progress: bool) -> str:
        """Prepare the data set and return its sizes in one line."""
        found = prepare_questions(self, progress=progress).manifest
        train, val, test = (
            f"{questions:,} in {windows:,} windows"
            for questions, windows in zip(found["questions"].values(), found["counts"].values(), strict=True)
        )
        return f"{self.name}: questions to train on {train}, to validate {val}, to test {test}"


@dataclass(frozen=True)
class Questions:
    """The prepared data set. ``vocabulary``: how many ids the tokenizer has. ``tokenizer``: a digest of it.

    ``manifest`` records source, SHA-256 sums, counts, what was left out, seed, a digest of the split texts, which no
    tokenizer changes, and format version.
    """

    train: AnswerTable
    val: AnswerTable
    test: AnswerTable
    vocabulary: int
    tokenizer: str
    manifest: dict[str, Any]


def prepare_questions(
    config: QuestionsConfig, tokenizer: Tokenizer | Path | None = None, *, progress: bool = True
) -> Questions:
    """Return the data set, prepared once for each seed, length, stride, tokenizer and directory, then from the cache.

    ``tokenizer``: of the model, or the path of its tokenizer.json; ``config.tokenizer`` comes before it, and
    ``config.encoder`` after it. ``progress``: report on stderr. Raises `UserError` for anything the user can fix: no
    data root or a wrong one, a malformed file in it, questions that ``max_length`` has no room for, a cache that cannot
    be written, a file that is not a tokenizer.
    """
    config.check()
    report = Progress(progress)
    opened = config.open_tokenizer(tokenizer, progress=progress)
    located = SQUAD_V2.locate(config.root)
    key = f"v{FORMAT_VERSION}-seed{config.seed}-stride{config.stride}-{tokenizer_digest(opened)}{located.key}"
    content = prepare_data(config, key, partial(_build, config, opened, located, report), report)
    train, val, test = (_table(content, part, padding_of(opened)) for part in PARTS)
    return Questions(train, val, test, ids_of(opened), tokens_digest(opened), content.manifest)


def _table(content: Prepared, part: str, padding: int) -> AnswerTable:
    columns = content.columns(part)
    return AnswerTable(target_N=columns.pop("span_N2"), padding=padding, has_pairs=True, **columns)


def _build(
    config: QuestionsConfig,
    opened: Tokenizer,
    located: Located[tuple[list[Question], list[Question]]],
    report: Progress,
    downloads: Path,
) -> Prepared:
    (train, dev), source = located.read(downloads, report)
    parts, repeated = _parts(train, dev, config.seed)
    tokenizer = Tokenizer.from_str(opened.to_str())
    tokenizer.no_truncation()
    windows = {
        part: windows_of(tokenizer, questions, config.max_length, config.stride, part, report)
        for part, questions in parts.items()
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "source": source,
        "seed": config.seed,
        "split": digest_of_content(parts),
        "max_length": config.max_length,
        "stride": config.stride,
        "tokenizer": tokenizer_digest(opened),
        "counts": {part: len(found.question_N) for part, found in windows.items()},
        "questions": {part: len(questions) for part, questions in parts.items()},
        "unanswerable": {part: sum(not q.answers for q in questions) for part, questions in parts.items()},
        "in_no_window": {part: _in_no_window(parts[part], found) for part, found in windows.items()},
        "left_out": {"in_test": repeated},
        "tokens": {part: len(found.rows.token_M) for part, found in windows.items()},
    }
    columns = {
        part: found.rows.columns
        | {"span_N2": found.span_N2, "question_N": found.question_N, "place_M2": found.place_M2}
        | {"written_J": written(parts[part])}
        for part, found in windows.items()
    }
    return Prepared(by_part(columns), manifest)


def _parts(train: list[Question], dev: list[Question], seed: int) -> tuple[dict[str, list[Question]], int]:
    """Return the questions of each part, and how many of the training file ask about a text of the test part.

    The files go from article to article; the questions to train and to validate on are in random order, so that the
    first ones are a sample of all. Raises UserError if a part has none.
    """
    texts = {context: identity((context,)) for context in {question.context for question in train + dev}}
    known = {texts[question.context] for question in dev}
    fresh = [question for question in train if texts[question.context] not in known]
    distinct = list(dict.fromkeys(texts[question.context] for question in fresh))
    random = np.random.Generator(np.random.PCG64(seed))
    _, val_V = split_off_tenths(np.zeros(len(distinct)), 1, random)
    (order_N,) = split_off_tenths(np.zeros(len(fresh)), 0, random)
    held_out = {distinct[i] for i in val_V}
    parts: dict[str, list[Question]] = {part: [] for part in PARTS}
    for question in (fresh[i] for i in order_N):
        parts["val" if texts[question.context] in held_out else "train"].append(question)
    parts["test"] = dev
    for part, questions in parts.items():
        if not questions:
            raise UserError(f"{SQUAD_V2.title}: no examples are left for {part}; the files hold too few")
    return parts, len(train) - len(fresh)


def _in_no_window(questions: list[Question], windows: AnswerWindows) -> int:
    """Count questions with an answer that no window holds as a whole: it is too long, or has no tokens."""
    holding = set(windows.question_N[windows.span_N2.any(axis=1)].tolist())
    return sum(bool(question.answers) and number not in holding for number, question in enumerate(questions))
