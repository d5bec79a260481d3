"""GLUE's tasks (Wang et al. 2019, arXiv:1804.07461) in the layout of its download: tab-separated files.

No package carries them: a user's own copy is read. The labels of the official test files are not published, so
the official development file is the test part here, and the validation part is cut from the training file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_moe.data.labelled_text.columns import Table, TextFile, tab_separated
from dist_moe.data.labelled_text.texts import LabelledTexts, Published

COLA_COLUMNS = ("source", "label", "mark", "sentence")
"""CoLA's files have no line with the names of the columns; the mark is the author's (an asterisk)."""

ENTAILMENT = ("entailment", "not_entailment")
INFERENCE = ("contradiction", "entailment", "neutral")
NO_YES = {"0": 0, "1": 1}
HIGHEST_SIMILARITY = 5.0


@dataclass(frozen=True)
class GlueColumns:
    """Where a task's files keep their texts and targets.

    ``classes``: class number by label; None: the target is a similarity, 0 to 5. ``header``: names of the columns
    where the files have none. ``skip_broken``: line ends within questions have broken some lines of QQP's files.
    """

    texts: tuple[str, ...]
    target: str
    classes: Mapping[str, int] | None
    header: tuple[str, ...] | None = None
    skip_broken: bool = False

    def read(self, files: list[TextFile]) -> Published:
        """The training file and the development file. Raises `UserError` for another layout."""
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
