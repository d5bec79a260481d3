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
from numpy.typing import NDArray
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from dist_moe.config.settings import Settings
from dist_moe.data.fetch.cache import Prepared, prepared
from dist_moe.data.fetch.locations import CACHE_DESCRIPTION, cache_directory, short_digest, usable
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text.answer_table import AnswerTable, written
from dist_moe.data.labelled_text.answer_windows import AnswerWindows, windows_of
from dist_moe.data.labelled_text.sources import check_source, directory_files, from_directory
from dist_moe.data.labelled_text.squad import SQUAD_V2, Question
from dist_moe.data.labelled_text.texts import dealt, identity
from dist_moe.data.labelled_text.tokens import digest_of, open_tokenizer, padding_of
from dist_moe.errors import UserError

FORMAT_VERSION = 2
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""

PARTS = ("train", "val", "test")
FEWEST_AROUND = 3
"""Tokens of a row that are not its text's: [CLS], [SEP] and [SEP]."""
COLUMNS = ("token_M", "start_P", "first_N", "span_N2", "question_N", "place_M2", "written_J")


class QuestionsConfig(Settings):
    """Questions whose answers are pieces of a text, and where their files are."""

    name: Literal["squad-v2"] = Field(default="squad-v2", description="SQuAD v2, which needs data.root.")
    root: Path | None = Field(
        default=None, description="Directory with train-v2.0.json and dev-v2.0.json; no package carries them."
    )
    cache: Path | None = Field(default=None, description=CACHE_DESCRIPTION)
    tokenizer: Path | None = Field(
        default=None,
        description="A tokenizer.json of the library tokenizers. If not given, the one that belongs to the encoder.",
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
        most = self.max_length - FEWEST_AROUND - 1
        if self.stride > most:
            raise ValueError(
                f"stride={self.stride}: a window of max_length={self.max_length} tokens can share at most {most} with "
                "the one before; give a smaller stride or a larger max_length"
            )
        return self

    def check(self) -> None:
        """Raises `UserError` where no file needs to be looked at to see that there is none."""
        check_source(SQUAD_V2, self.root)


@dataclass(frozen=True)
class Questions:
    """The prepared data set. ``vocabulary``: how many ids the tokenizer has.

    ``manifest`` records source, SHA-256 sums, counts, what was left out, seed and format version.
    """

    train: AnswerTable
    val: AnswerTable
    test: AnswerTable
    vocabulary: int
    manifest: dict[str, Any]


def prepare_questions(config: QuestionsConfig, tokenizer: Tokenizer | Path, *, progress: bool = True) -> Questions:
    """The data set, prepared once for each seed, length, stride, tokenizer and source directory, then from the cache.

    Safe to call from all ranks at once: one process prepares, the others wait for it.

    Args:
        config: what to prepare; see its fields. ``config.tokenizer`` comes before ``tokenizer``.
        tokenizer: of the model, or the path of its tokenizer.json.
        progress: report on stderr: bars on a terminal, lines elsewhere. False: silent.

    Raises:
        UserError: anything the user can mend: no data root or a wrong one, a malformed file in it, questions that
            ``max_length`` has no room for, a cache that cannot be written, a file that is not a tokenizer.
    """
    config.check()
    assert config.root is not None
    report = Progress(progress)
    opened = open_tokenizer(config.tokenizer or tokenizer, config.max_length)
    root, cache = config.root.expanduser().absolute(), cache_directory(config.cache)
    files = directory_files(SQUAD_V2, root)
    key = f"v{FORMAT_VERSION}-seed{config.seed}-stride{config.stride}-{digest_of(opened)}-{short_digest(files)}"
    with usable(cache):
        build = partial(_build, config, opened, root, files, report)
        content = prepared(cache / config.name / key, build, report)
    train, val, test = (_table(content, part, padding_of(opened)) for part in PARTS)
    return Questions(train, val, test, opened.get_vocab_size(), content.manifest)


def _table(content: Prepared, part: str, padding: int) -> AnswerTable:
    token_M, start_P, first_N, span_N2, *others = (content.arrays[f"{part}_{column}"] for column in COLUMNS)
    return AnswerTable(token_M, start_P, first_N, span_N2, padding, True, *others)


def _build(config: QuestionsConfig, opened: Tokenizer, root: Path, files: dict[str, str], report: Progress) -> Prepared:
    source = from_directory(SQUAD_V2, root, files, report)
    parts, repeated = _parts(*source.content, config.seed)
    tokenizer = Tokenizer.from_str(opened.to_str())
    tokenizer.no_truncation()
    windows = {
        part: windows_of(tokenizer, questions, config.max_length, config.stride, part, report)
        for part, questions in parts.items()
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "source": source.provenance,
        "seed": config.seed,
        "max_length": config.max_length,
        "stride": config.stride,
        "tokenizer": digest_of(opened),
        "counts": {part: len(found.question_N) for part, found in windows.items()},
        "questions": {part: len(questions) for part, questions in parts.items()},
        "unanswerable": {part: sum(not q.answers for q in questions) for part, questions in parts.items()},
        "in_no_window": {part: _in_no_window(parts[part], found) for part, found in windows.items()},
        "left_out": {"in_test": repeated},
        "tokens": {part: len(found.rows.token_M) for part, found in windows.items()},
    }
    arrays: dict[str, NDArray[Any]] = {}
    for part, found in windows.items():
        rows, texts = found.rows, written(parts[part])
        columns: tuple[NDArray[Any], ...] = (
            *(rows.token_M, rows.start_P, rows.first_N),
            *(found.span_N2, found.question_N, found.place_M2, texts),
        )
        arrays |= {f"{part}_{name}": column for name, column in zip(COLUMNS, columns, strict=True)}
    return Prepared(arrays, manifest)


def _parts(train: list[Question], dev: list[Question], seed: int) -> tuple[dict[str, list[Question]], int]:
    """The questions of each part, and how many of the training file ask about a text of the test part.

    The files go from article to article; the questions to train and to validate on are in random order, so that the
    first ones are a sample of all. Raises UserError if a part has none.
    """
    texts = {context: identity((context,)) for context in {question.context for question in train + dev}}
    known = {texts[question.context] for question in dev}
    fresh = [question for question in train if texts[question.context] not in known]
    distinct = list(dict.fromkeys(texts[question.context] for question in fresh))
    random = np.random.Generator(np.random.PCG64(seed))
    _, val_V = dealt(np.zeros(len(distinct), dtype=np.int64), 1, random)
    (order_N,) = dealt(np.zeros(len(fresh), dtype=np.int64), 0, random)
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
    """Questions with an answer that no window holds as a whole: it is too long, or has no tokens."""
    holding = set(windows.question_N[windows.span_N2.any(axis=1)].tolist())
    return sum(bool(question.answers) and number not in holding for number, question in enumerate(questions))
