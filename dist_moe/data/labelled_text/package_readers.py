"""The files of labelled texts that packages carry.

Sentiment (Hutto and Gilbert, ICWSM 2014; MIT licence): sentences of four kinds, each rated from -4 (extremely
negative) to 4 by about 20 people, of whom the mean is given. TREC questions (Li and Roth, COLING 2002). SMS spam
(Almeida, Hidalgo and Yamakami 2011). 20 Newsgroups (Lang 1995) as A. Cardoso-Cachopo divided and cleaned it:
lower case, letters only.
"""

from __future__ import annotations

from dist_moe.data.labelled_text.columns import Table, TextFile, comma_separated, shown, tab_separated
from dist_moe.data.labelled_text.texts import LabelledTexts, Published
from dist_moe.errors import UserError

STRONGEST_RATING = 4.0
SIGNS = ("negative", "positive")
QUESTION_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
SPAM_CLASSES = ("ham", "spam")
NEWSGROUPS = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)
HEADER_LINES_OF_ORANGE = 3
"""Names, types and roles of the columns."""


def read_ratings(files: list[TextFile]) -> Published:
    """Sentences and their mean ratings, -4 to 4. Raises `UserError`."""
    table = comma_separated(files[0])
    ratings = table.numbers("sentiment", -STRONGEST_RATING, STRONGEST_RATING)
    return Published(LabelledTexts(_single(table.texts("text")), ratings))


def read_rating_signs(files: list[TextFile]) -> Published:
    """Sentences and whether their mean rating is above 0; those rated 0 say neither and are left out.

    Raises:
        UserError: the file is malformed.
    """
    rated = read_ratings(files).train
    chosen = rated.take([i for i, rating in enumerate(rated.targets) if rating != 0])
    signs = [float(rating > 0) for rating in chosen.targets]
    return Published(LabelledTexts(chosen.texts, signs), left_out={"neutral": len(rated) - len(chosen)})


def read_questions(files: list[TextFile]) -> Published:
    """TREC's questions by coarse class; a line is ``COARSE:fine question``. Raises `UserError`."""
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


def read_messages(files: list[TextFile]) -> Published:
    """SMS messages, spam or not. Raises `UserError`."""
    table = comma_separated(files[0])
    return Published(LabelledTexts(_single(table.texts("text")), table.classes("spam", {"0": 0, "1": 1})))


def read_newsgroups(files: list[TextFile]) -> Published:
    """Posts by newsgroup; the published division into training and test files. Raises `UserError`."""
    train, test = (_posts(file) for file in files)
    return Published(train, test)


def _posts(file: TextFile) -> LabelledTexts:
    whole = tab_separated(file)
    orange = HEADER_LINES_OF_ORANGE - 1  # the first line has become the header
    table = Table(whole.path, whole.header, whole.rows[orange:], whole.line_N[orange:])
    groups = {group: number for number, group in enumerate(NEWSGROUPS)}
    return LabelledTexts(_single(table.texts("Text")), table.classes("Category", groups))


def _single(texts: list[str]) -> list[tuple[str, ...]]:
    return [(text,) for text in texts]
