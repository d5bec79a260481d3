"""Odd texts: a user's own, labelled ones, and questions with answers."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dist_moe.data.labelled_text import (
    GRADED,
    TASKS,
    LabelledTextConfig,
    QuestionsConfig,
    prepare_labelled_text,
    prepare_questions,
)
from dist_moe.data.labelled_text.squad import SQUAD_V2
from dist_moe.data.text import TextConfig, prepare_text
from tests.data.labelled_text.tiny_texts import SAMPLES, tiny_tokenizer, write_task
from tests.data.text.test_own_tokenizer import byte_level
from tests.data.text.tiny_text import write_tiny_text
from tools.fuzzing.data_set import SILENT, DataSet, Rows, difference, files_of, lines_of, spreadsheet, tabular
from tools.fuzzing.mutate import copied, odd_json

LONG = ("a", "ab ", "\u6771", "\U0001f642")


class Text(DataSet):
    """A user's own text, with a vocabulary that is learned or with a tokenizer of the user's own."""

    def __init__(self, own_tokenizer: bool) -> None:
        self.own_tokenizer = own_tokenizer

    def write(self, root: Path) -> object:
        """Write two domains, and a tokenizer beside them."""
        write_tiny_text(root / "text", count=6)
        shutil.rmtree(root / "text" / "letters")
        if self.own_tokenizer:
            (root / "tokenizer").mkdir()
            byte_level().save(str(root / "tokenizer" / "tokenizer.json"))
            (root / "tokenizer" / "config.json").write_text(
                json.dumps({"eos_token_id": 1, "vocab_size": 400}), encoding="utf-8"
            )
        return root

    def read(self, root: Path, cache: Path) -> Any:
        """Return the prepared text."""
        own = root / "tokenizer" if self.own_tokenizer else None
        fields = {"root": root / "text", "cache": cache, "held_out": 0.2, "sequence_length": 4, "tokenizer": own}
        config = TextConfig(vocab_size=300, characters_per_domain=None, **fields)  # type: ignore[arg-type]
        return prepare_text(config, progress=False)

    def check(self, root: Path, found: Any) -> str | None:
        """Compare all documents, once each, with what the tokens say."""
        naive: set[str] = set()
        for domain in sorted(path for path in (root / "text").iterdir() if path.is_dir()):
            if not domain.name.startswith("."):
                paths = [path for path in domain.iterdir() if path.name.lower().endswith(".txt")]
                texts = [path.read_bytes().decode(errors="replace") for path in paths if not path.name.startswith(".")]
                texts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
                naive |= {text.removeprefix("\ufeff").strip() for text in texts}
        naive.discard("")
        read: list[str] = []
        for part in (found.train, found.val, found.test):
            ids = part.token_M.astype(int)
            ends = np.flatnonzero(ids == found.end_of_text)
            pieces = (ids[a + 1 : b].tolist() for a, b in pairwise(ends))
            read += [found.tokenizer.decode(piece, skip_special_tokens=False) for piece in pieces if piece]
            if len(ids) and int(ids.max()) >= found.vocab_size:
                return f"a token {ids.max()} beyond the vocabulary of {found.vocab_size}"
        return difference(Counter((text,) for text in naive), Counter((text,) for text in read))

    def change(self, root: Path, drawn: random.Random) -> str:
        """Change what lies in the directory, or a value of the tokenizer's files."""
        if self.own_tokenizer and drawn.random() < 0.7:
            path = drawn.choice(sorted((root / "tokenizer").iterdir()))
            content, what = odd_json(json.loads(path.read_text(encoding="utf-8")), drawn)
            path.write_text(json.dumps(content), encoding="utf-8")
            return f"{path.name}: {what}"
        sea = root / "text" / "sea"
        new: dict[str, Callable[[], object]] = {
            "a name that is no UTF-8": lambda: os.rename(os.fsencode(sea), os.fsencode(sea) + b"\xff\xfe"),
            "a name with a line end": lambda: sea.rename(sea.with_name("a\nb")),
            "a suffix in capitals": lambda: (sea / "000.txt").rename(sea / "000.TXT"),
            "other suffixes": lambda: (sea / "x.md").write_text("not read", encoding="utf-8"),
            "a name without suffix": lambda: (sea / "readme").write_text("not read", encoding="utf-8"),
            "a hidden file": lambda: (sea / "._000.txt").write_bytes(b"\0\5\26\7"),
            "a long document": lambda: (sea / "x.txt").write_text(drawn.choice(LONG) * 300_000, encoding="utf-8"),
            "white space": lambda: (sea / "x.txt").write_text(" \n\t\r\n", encoding="utf-8"),
            "a document in Latin-1": lambda: (sea / "x.txt").write_bytes("\u00e9t\u00e9 ".encode("latin-1") * 20),
            "text too deep": lambda: ((sea / "d").mkdir(), (sea / "d" / "x.TXT").write_text("x", encoding="utf-8")),
            "loose text": lambda: (root / "text" / "loose.Txt").write_text("x", encoding="utf-8"),
            "an empty domain": lambda: (root / "text" / "void").mkdir(),
            "a loop": lambda: (sea / "loop").symlink_to("."),
            "a domain elsewhere": lambda: (root / "text" / "linked").symlink_to("sea"),
            "the separator": lambda: (sea / "x.txt").write_text("a <|endoftext|> b <pad> c", encoding="utf-8"),
        }
        what = drawn.choice(list(new))
        new[what]()
        return what


class LabelledTexts(DataSet):
    """Labelled texts of one task."""

    def __init__(self, name: str, graded: bool = False) -> None:
        self.name, self.graded = name, graded
        self.task = (GRADED if graded else TASKS)[name]
        self.separator = (
            " " if name == "trec" else "," if name.startswith("s") and name not in ("sst-2", "sts-b") else "\t"
        )
        self.encoding = "latin-1" if name == "trec" else "utf-8"

    def write(self, root: Path) -> object:
        """Write the files of the task, those of GLUE from samples."""
        source = write_task(self.name, root)
        return root if source == root else copied(source, root)

    def read(self, root: Path, cache: Path) -> Any:
        """Return the prepared tables and the texts that they are made of."""
        fields = {"name": self.name, "root": root, "cache": cache, "max_length": 24, "graded": self.graded}
        config = LabelledTextConfig.model_validate(fields)
        prepared = prepare_labelled_text(config, tiny_tokenizer(), progress=False)
        return prepared, config.task.locate(root).read(cache, SILENT)[0]

    def check(self, root: Path, found: Any) -> str | None:
        """Compare all texts with their targets, and that all are counted."""
        prepared, published = found
        for part, names in ((published.train, self.task.files[:1]), (published.test, self.task.files[1:])):
            if part is not None:
                rows = Counter((*text, target) for text, target in zip(part.texts, part.targets, strict=True))
                if complaint := difference(self._naive(root / names[0][0]), rows):
                    return complaint
        whole = len(published.train) + (len(published.test) if published.test is not None else 0)
        left_out = {k: n for k, n in prepared.manifest["left_out"].items() if k not in published.left_out}
        counted = sum(prepared.manifest["counts"].values()) + sum(left_out.values())
        return None if counted == whole else f"{whole} examples were read, {counted} are in parts or left out"

    def _naive(self, path: Path) -> Rows:
        if self.name == "trec":
            lines = lines_of(path, "latin-1")
            pairs = [(line.split(" ", 1)[1], line.split(":")[0].split(" ")[0]) for line in lines]
            return Counter((text, float(self.task.classes.index(label))) for text, label in pairs)
        if self.name == "20-newsgroups":
            rows = tabular(path)[2:]
            return Counter((row["Text"], float(self.task.classes.index(row["Category"]))) for row in rows)
        if self.name == "sms-spam":
            return Counter((row["text"], float("01".index(row["spam"]))) for row in spreadsheet(path))
        if self.name.startswith("sentiment"):
            rated = [(row["text"], float(row["sentiment"])) for row in spreadsheet(path)]
            return Counter(
                pair if self.graded else (pair[0], float(pair[1] > 0)) for pair in rated if self.graded or pair[1]
            )
        if self.name == "cola":
            return Counter((row[3], float("01".index(row[1]))) for row in (line.split("\t") for line in lines_of(path)))
        columns = self.task.read.__self__  # type: ignore[attr-defined]
        header, *rest = (line.split("\t") for line in lines_of(path))
        kept = [
            dict(zip(header, row, strict=True)) for row in rest if not columns.skip_broken or len(row) == len(header)
        ]
        return Counter((*(row[name] for name in columns.texts), self._target(row[columns.target])) for row in kept)

    def _target(self, cell: str) -> float:
        columns = self.task.read.__self__  # type: ignore[attr-defined]
        return float(cell) if columns.classes is None else float(columns.classes.index(cell))


class Squad(DataSet):
    """Questions with answers."""

    def write(self, root: Path) -> object:
        """Write both files from a sample."""
        return copied(SAMPLES / "SQuAD", root)

    def read(self, root: Path, cache: Path) -> Any:
        """Return the prepared windows and the questions that they are made of."""
        config = QuestionsConfig(root=root, cache=cache, max_length=60, stride=14)
        prepared = prepare_questions(config, tiny_tokenizer(), progress=False)
        return prepared, SQUAD_V2.locate(root).read(cache, SILENT)[0]

    def check(self, root: Path, found: Any) -> str | None:
        """Compare all questions, contexts and answers."""
        _, parts = found
        for name, questions in zip(("train-v2.0.json", "dev-v2.0.json"), parts, strict=True):
            content = json.loads((root / name).read_text(encoding="utf-8-sig"))
            naive = Counter(
                (entry["question"], paragraph["context"], *(answer["text"] for answer in entry["answers"]))
                for article in content["data"]
                for paragraph in article["paragraphs"]
                for entry in paragraph["qas"]
            )
            read = Counter((q.question, q.context, *(answer.text for answer in q.answers)) for q in questions)
            if complaint := difference(naive, read):
                return complaint
            for question in questions:
                for answer in question.answers:
                    if question.context[answer.start :][: len(answer.text)] != answer.text or answer.start < 0:
                        return f"the answer {answer.text!r} is not where it is said to be"
        return None

    def change(self, root: Path, drawn: random.Random) -> str:
        """Change a value of a file."""
        path = drawn.choice(files_of(root))
        content, what = odd_json(json.loads(path.read_text(encoding="utf-8")), drawn)
        path.write_text(json.dumps(content), encoding="utf-8")
        return f"{path.name}: {what}"
