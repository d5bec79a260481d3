"""Odd files in the place of data sets; what is accepted must be what a naive reader of the same files finds."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
import shutil
import struct
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dist_moe.data.fetch.progress import Progress
from dist_moe.data.labelled_text import (
    GRADED,
    TASKS,
    LabelledTextConfig,
    QuestionsConfig,
    prepare_labelled_text,
    prepare_questions,
)
from dist_moe.data.labelled_text.squad import SQUAD_V2
from dist_moe.data.movielens import MovieLensConfig, prepare_movielens
from dist_moe.data.movielens.sources import EDITIONS
from dist_moe.data.text import TextConfig, prepare_text
from dist_moe.data.two_images import TwoImagesConfig, prepare_two_images
from dist_moe.data.two_images.sources import STEMS
from tests.data.labelled_text.tiny_texts import SAMPLES, tiny_tokenizer, write_task
from tests.data.text.test_own_tokenizer import byte_level
from tests.data.text.tiny_text import write_tiny_text
from tests.data.tiny_images import write_tiny_images
from tests.data.tiny_latest_small import write_tiny_latest_small
from tests.data.tiny_movielens import write_tiny_movielens
from tools.fuzzing.case import Area, Case, Must
from tools.fuzzing.mutate import copied, odd_bytes, odd_cell, odd_file, odd_json

SILENT = Progress(False)
Rows = Counter[tuple[Any, ...]]


class DataSet(ABC):
    """A data set in a user's directory: how good files are written, read by the product, and read naively."""

    separator: ClassVar[str] = "\t"
    encoding: ClassVar[str] = "utf-8"

    @abstractmethod
    def write(self, root: Path) -> object:
        """Write good files."""

    @abstractmethod
    def read(self, root: Path, cache: Path) -> Any:
        """Return what the product makes of the files."""

    @abstractmethod
    def check(self, root: Path, found: Any) -> str | None:
        """Return what is wrong with that, by reading the files naively."""

    def change(self, root: Path, drawn: random.Random) -> str:
        """Change the files in a way of this data set."""
        path = drawn.choice(files_of(root))
        return odd_cell(path, drawn, self.separator, self.encoding)


def files_of(root: Path) -> list[Path]:
    """Return the files below a directory, in order."""
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def lines_of(path: Path, encoding: str = "utf-8-sig") -> list[str]:
    """Return the lines of a text file that are not empty; only newlines end one, after a carriage return or not."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode(encoding)
    return [line.removesuffix("\r") for line in text.split("\n") if line.removesuffix("\r")]


def tabular(path: Path, encoding: str = "utf-8-sig") -> list[dict[str, str]]:
    """Return the rows of a file parted by tabs, by the names in its first line."""
    header, *rows = (line.split("\t") for line in lines_of(path, encoding))
    return [dict(zip(header, row, strict=True)) for row in rows]


def spreadsheet(path: Path) -> list[dict[str, str]]:
    """Return the rows of a comma-separated file, packed or not, by the names in its first line."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    limit = csv.field_size_limit(len(text) + 1)
    try:
        header, *rows = (row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row)
    finally:
        csv.field_size_limit(limit)
    return [dict(zip(header, row, strict=True)) for row in rows]


def difference(naive: Rows, found: Rows) -> str | None:
    """Return how two bags of rows differ; None if they do not."""
    if naive == found:
        return None
    lost, added = list((naive - found).items())[:2], list((found - naive).items())[:2]
    return f"{naive.total()} rows by a naive reading, {found.total()} found; lost {lost}, added {added}"[:600]


class MovieLens(DataSet):
    """Ratings of one of the editions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_small = name == "movielens-latest-small"
        self.separator, self.encoding = (",", "utf-8") if self.is_small else ("::", "latin-1")

    def write(self, root: Path) -> object:
        """Write ratings and movies."""
        return write_tiny_latest_small(root) if self.is_small else write_tiny_movielens(root, users=12, items=9)

    def read(self, root: Path, cache: Path) -> Any:
        """Return the prepared tables and the ratings that they are made of."""
        config = MovieLensConfig(name=self.name, root=root, cache=cache, negatives="per_user")  # type: ignore[arg-type]
        prepared = prepare_movielens(config, progress=False)
        return prepared, EDITIONS[self.name].locate(root).read(cache, SILENT)[0]

    def check(self, root: Path, found: Any) -> str | None:
        """Compare users, titles and stars of all ratings, and that each is in one part."""
        prepared, ratings = found
        columns = (ratings.user_ids[ratings.user_N].tolist(), ratings.item_N.tolist(), ratings.rating_N.tolist())
        rows = Counter((user, ratings.titles[item], stars) for user, item, stars in zip(*columns, strict=True))
        if complaint := difference(self._naive(root), rows):
            return complaint
        parts = (prepared.train, prepared.val, prepared.test)
        watched = Counter(
            (int(u), int(i), float(r))
            for part in parts
            for u, i, r in zip(part.user_N, part.item_N, part.rating_N, strict=True)
            if r > 0
        )
        columns = (ratings.user_N.tolist(), ratings.item_N.tolist(), ratings.rating_N.tolist())
        return difference(Counter(zip(*columns, strict=True)), watched)

    def _naive(self, root: Path) -> Rows:
        if self.is_small:
            titles = {int(row["movieId"]): row["title"] for row in spreadsheet(root / "movies.csv")}
            short = {movie: re.search(r"(.*)\s\(\d+\)", title) for movie, title in titles.items()}
            return Counter(
                (int(row["userId"]), found[1] if (found := short[int(row["movieId"])]) else "", float(row["rating"]))
                for row in spreadsheet(root / "ratings.csv")
            )
        try:
            movies = lines_of(root / "movies.dat")
        except UnicodeDecodeError:
            movies = lines_of(root / "movies.dat", "latin-1")
        titles = {int(movie): title for movie, title, _ in (line.split("::") for line in movies)}
        ratings = (line.split("::") for line in lines_of(root / "ratings.dat"))
        return Counter((int(user), titles[int(movie)], float(stars)) for user, movie, stars, _ in ratings)


class TwoImages(DataSet):
    """The four files of images and labels."""

    def write(self, root: Path) -> object:
        """Write them, half of the times compressed."""
        return write_tiny_images(root, gz=len(str(root)) % 2 == 0)

    def read(self, root: Path, cache: Path) -> Any:
        """Return the prepared pairs."""
        return prepare_two_images(TwoImagesConfig(name="multi-mnist", root=root, cache=cache), progress=False)

    def check(self, root: Path, found: Any) -> str | None:
        """Compare every pixel and every label."""
        naive = [self._naive(root, stem) for stem in STEMS]
        for kind, place in (("images", 0), ("labels", 1)):
            train = np.concatenate([getattr(found.train, kind), getattr(found.val, kind)])
            for array, wanted in ((train, naive[place]), (getattr(found.test, kind), naive[place + 2])):
                if not np.array_equal(array, wanted):
                    return f"{kind} differ"
        return None

    def change(self, root: Path, drawn: random.Random) -> str:
        """Change a size in a header, or a label."""
        path = drawn.choice(files_of(root))
        packed = path.suffix == ".gz"
        content = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        place = drawn.choice([2, 3, 4, 8, 12, 9, 20])
        odd = drawn.choice([0, 1, 10, 28, 255, 2**31, 2**32 - 1, 65536])
        content[place : place + 4] = struct.pack(">I", odd)
        path.write_bytes(gzip.compress(bytes(content)) if packed else bytes(content))
        return f"{path.name}: {odd} at byte {place}"

    @staticmethod
    def _naive(root: Path, stem: str) -> Any:
        path = next(path for path in (root / stem, root / f"{stem}.gz") if path.is_file())
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        zero, kind, dimensions = struct.unpack(">HBB", content[:4])
        assert (zero, kind) == (0, 8)
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        return np.array(list(content[4 + 4 * dimensions :]), np.uint8).reshape(shape)


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
            (root / "tokenizer" / "config.json").write_text(json.dumps({"eos_token_id": 1, "vocab_size": 400}))
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
                naive |= {
                    text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff").strip() for text in texts
                }
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
            content, what = odd_json(json.loads(path.read_text()), drawn)
            path.write_text(json.dumps(content))
            return f"{path.name}: {what}"
        sea = root / "text" / "sea"
        new: dict[str, Callable[[], object]] = {
            "a name that is no UTF-8": lambda: os.rename(os.fsencode(sea), os.fsencode(sea) + b"\xff\xfe"),
            "a name with a line end": lambda: sea.rename(sea.with_name("a\nb")),
            "a suffix in capitals": lambda: (sea / "000.txt").rename(sea / "000.TXT"),
            "other suffixes": lambda: (sea / "x.md").write_text("not read"),
            "a name without suffix": lambda: (sea / "readme").write_text("not read"),
            "a hidden file": lambda: (sea / "._000.txt").write_bytes(b"\0\5\26\7"),
            "a long document": lambda: (sea / "x.txt").write_text(
                drawn.choice(["a", "ab ", "\u6771", "\U0001f642"]) * 300_000
            ),
            "white space": lambda: (sea / "x.txt").write_text(" \n\t\r\n"),
            "a document in Latin-1": lambda: (sea / "x.txt").write_bytes("\u00e9t\u00e9 ".encode("latin-1") * 20),
            "text too deep": lambda: ((sea / "d").mkdir(), (sea / "d" / "x.TXT").write_text("x")),
            "loose text": lambda: (root / "text" / "loose.Txt").write_text("x"),
            "an empty domain": lambda: (root / "text" / "void").mkdir(),
            "a loop": lambda: (sea / "loop").symlink_to("."),
            "a domain elsewhere": lambda: (root / "text" / "linked").symlink_to("sea"),
            "the separator": lambda: (sea / "x.txt").write_text("a <|endoftext|> b <pad> c"),
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
        content, what = odd_json(json.loads(path.read_text()), drawn)
        path.write_text(json.dumps(content))
        return f"{path.name}: {what}"


DATA_SETS: dict[str, DataSet] = {
    "movielens-1m": MovieLens("movielens-1m"),
    "movielens-latest-small": MovieLens("movielens-latest-small"),
    "two images": TwoImages(),
    "text": Text(own_tokenizer=False),
    "text, own tokenizer": Text(own_tokenizer=True),
    "squad": Squad(),
    **{name: LabelledTexts(name) for name in TASKS},
    "sentiment-movies, graded": LabelledTexts("sentiment-movies", graded=True),
}


class DataArea(Area):
    """Directories of data sets: as they are, or with one thing or two changed."""

    name = "data"

    def prepare(self) -> None:
        """Write each data set once."""
        for name, data in DATA_SETS.items():
            (self.base / name).mkdir(parents=True)
            data.write(self.base / name)

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Change a data set, or what was prepared of it."""
        name = drawn.choice(list(DATA_SETS))
        data = DATA_SETS[name]
        copied(self.base / name, user)
        kind = drawn.choices(["none", "kind", "bytes", "own", "own twice", "prepared"], [1, 3, 6, 10, 2, 1])[0]
        must: Must = None
        if kind in ("none", "prepared"):
            what, must = kind, "accept"
        elif kind == "kind":
            what = odd_file(drawn.choice(files_of(user)), drawn)
        elif kind == "bytes":
            what = odd_bytes(drawn.choice(files_of(user)), drawn)
        else:
            what = data.change(user, drawn)
            if kind == "own twice":
                what += f"; {odd_bytes(drawn.choice(files_of(user)), drawn)}"

        def run() -> Any:
            if kind == "prepared":
                data.read(user, ours / "cache")
                path = drawn.choice([path for path in files_of(ours) if path.suffix in (".npy", ".json")])
                (odd_file if path.suffix == ".json" or drawn.random() < 0.3 else odd_bytes)(path, drawn)
            return data.read(user, ours / "cache")

        return Case(f"{name}: {what}", run, lambda found: data.check(user, found), must)
