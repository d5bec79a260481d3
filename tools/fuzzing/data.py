"""Odd files in the place of data sets; what is accepted must be what a naive reader of the same files finds."""

from __future__ import annotations

import gzip
import random
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dist_moe.data.labelled_text import TASKS
from dist_moe.data.movielens import MovieLensConfig, prepare_movielens
from dist_moe.data.movielens.readers import before_year
from dist_moe.data.movielens.sources import EDITIONS
from dist_moe.data.two_images import TwoImagesConfig, prepare_two_images
from dist_moe.data.two_images.sources import STEMS
from tests.data.tiny_images import write_tiny_images
from tests.data.tiny_latest_small import write_tiny_latest_small
from tests.data.tiny_movielens import write_tiny_movielens
from tools.fuzzing.case import Area, Case, Must
from tools.fuzzing.data_set import SILENT, DataSet, Rows, difference, files_of, lines_of, spreadsheet
from tools.fuzzing.mutate import copied, odd_bytes, odd_file
from tools.fuzzing.texts import LabelledTexts, Squad, Text


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
            return Counter(
                (int(row["userId"]), before_year(titles[int(row["movieId"])]), float(row["rating"]))
                for row in spreadsheet(root / "ratings.csv")
            )
        movies, ratings = (_grouplens(root / name) for name in ("movies.dat", "ratings.dat"))
        titles = {int(movie): title for movie, title, _ in movies}
        return Counter((int(user), titles[int(movie)], float(stars)) for user, movie, stars, _ in ratings)


def _grouplens(path: Path) -> list[list[str]]:
    """Return the cells of a .dat file, which is in Latin-1 as GroupLens has it, or in UTF-8."""
    try:
        lines = lines_of(path)
    except UnicodeDecodeError:
        lines = lines_of(path, "latin-1")
    return [line.split("::") for line in lines]


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
