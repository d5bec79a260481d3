"""Readers of labelled texts, as packages or GLUE's download have them.

Sentiment (Hutto and Gilbert, ICWSM 2014; MIT licence): sentences of four kinds, each rated from -4 (extremely
negative) to 4 by about 20 people, of whom the mean is given. TREC questions (Li and Roth, COLING 2002). SMS spam
(Almeida, Hidalgo and Yamakami 2011). 20 Newsgroups (Lang 1995) as A. Cardoso-Cachopo divided and cleaned it:
lower case, letters only.

GLUE's tasks (Wang et al. 2019, arXiv:1804.07461) are tab-separated files that no package carries. The labels of the
official test files are not published, so the official development file is the test part here, and the validation part
is cut from the training file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.tables import Table, comma_separated, shown, tab_separated
from dist_moe.data.labelled_text.texts import LabelledTexts, Published
from dist_moe.errors import UserError

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
HEADER_LINES_OF_ORANGE = 3
"""Names, types and roles of the columns."""


def read_ratings(files: list[File], progress: Progress) -> Published:
    """Read sentences and their mean ratings, -4 to 4. Raises `UserError`."""
    table = comma_separated(files[0])
    ratings = table.numbers("sentiment", -STRONGEST_RATING, STRONGEST_RATING)
    return Published(LabelledTexts(_single(table.texts("text")), ratings))


def read_rating_signs(files: list[File], progress: Progress) -> Published:
    """Read sentences and whether their mean rating is above 0; those rated 0 say neither and are left out.

    Raises:
        UserError: the file is malformed.
    """
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
    return Published(LabelledTexts(_single(table.texts("text")), table.classes("spam", {"0": 0, "1": 1})))


def read_newsgroups(files: list[File], progress: Progress) -> Published:
    """Read posts by newsgroup; the published division into training and test files. Raises `UserError`."""
    train, test = (_posts(file) for file in files)
    return Published(train, test)


def _posts(file: File) -> LabelledTexts:
    whole = tab_separated(file)
    orange = HEADER_LINES_OF_ORANGE - 1  # the first line has become the header
    table = Table(whole.path, whole.header, whole.rows[orange:], whole.line_N[orange:])
    groups = {group: number for number, group in enumerate(NEWSGROUPS)}
    return LabelledTexts(_single(table.texts("Text")), table.classes("Category", groups))


def _single(texts: list[str]) -> list[tuple[str, ...]]:
    return [(text,) for text in texts]


COLA_COLUMNS = ("source", "label", "mark", "sentence")
"""CoLA's files have no line with the names of the columns; the mark is the author's (an asterisk)."""

ENTAILMENT = ("entailment", "not_entailment")
INFERENCE = ("contradiction", "entailment", "neutral")
NO_YES = {"0": 0, "1": 1}
HIGHEST_SIMILARITY = 5.0


@dataclass(frozen=True)
class GlueColumns:
    """Columns of a task's files that hold its texts and targets.

    ``classes``: class number by label; None: the target is a similarity, 0 to 5. ``header``: names of the columns
    where the files have none. ``skip_broken``: line ends within questions have broken some lines of QQP's files.
    """

    texts: tuple[str, ...]
    target: str
    classes: Mapping[str, int] | None
    header: tuple[str, ...] | None = None
    skip_broken: bool = False

    def read(self, files: list[File], progress: Progress) -> Published:
        """Read the training file and the development file. Raises `UserError` for another layout."""
        train, development = (tab_separated(file, self.header, skip_broken=self.skip_broken) for file in files)
        broken = {"broken_lines": train.broken + development.broken} if self.skip_broken else {}
        return Published(self._labelled(train), self._labelled(development), broken)

    def _labelled(self, table: Table) -> LabelledTexts:
        texts = list(zip(*(table.texts(name) for name in self.texts), strict=True))
        if self.classes is None:
            return LabelledTexts(texts, table.numbers(self.target, 0, HIGHEST_SIMILARITY))
        return LabelledTexts(texts, table.classes(self.target, self.classes))


def _numbered(labels: tuple[str, ...]) -> dict[str, int]:
    return {label: number for number, label in enumerate(labels)}


COLA = GlueColumns(("sentence",), "label", NO_YES, header=COLA_COLUMNS)
SST_2 = GlueColumns(("sentence",), "label", NO_YES)
MRPC = GlueColumns(("#1 String", "#2 String"), "Quality", NO_YES)
STS_B = GlueColumns(("sentence1", "sentence2"), "score", None)
QQP = GlueColumns(("question1", "question2"), "is_duplicate", NO_YES, skip_broken=True)
MNLI = GlueColumns(("sentence1", "sentence2"), "gold_label", _numbered(INFERENCE))
QNLI = GlueColumns(("question", "sentence"), "label", _numbered(ENTAILMENT))
RTE = GlueColumns(("sentence1", "sentence2"), "label", _numbered(ENTAILMENT))
