"""dist-moe data: fetch and prepare data sets."""

from __future__ import annotations

import argparse
from collections.abc import Sized
from pathlib import Path

from dist_moe.cli.commands import Commands

DATA_SETS = ("movielens-1m", "movielens-latest-small", "multi-fashion-mnist", "multi-mnist", "text", "brown")


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    data = commands.add_parser("data", help="fetch and prepare data sets")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    fetch = verbs.add_parser("fetch", help="fetch and prepare a data set, once")
    fetch.add_argument("name", choices=DATA_SETS, metavar="NAME", help=" | ".join(DATA_SETS))
    fetch.add_argument("--data-root", type=Path, metavar="DIR", help="directory of the original files")
    fetch.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.name in ("text", "brown"):
        from dist_moe.cli.data_text import fetch_text

        return fetch_text(options)
    from dist_moe.data.movielens import MovieLensConfig, prepare
    from dist_moe.data.two_images import TwoImagesConfig, prepare_two_images

    parts: tuple[Sized, ...]
    if options.name.startswith("movielens"):
        table = prepare(MovieLensConfig(name=options.name, root=options.data_root))
        sizes = f"{table.num_users:,} users, {table.num_items:,} items, "
        parts = (table.train, table.val, table.test)
    else:
        pictures = prepare_two_images(TwoImagesConfig(name=options.name, root=options.data_root))
        sizes = f"{len(pictures.train.images):,} images to train on, "
        parts = (pictures.train, pictures.val, pictures.test)
    train, val, test = map(len, parts)
    print(f"{options.name}: {sizes}pairs to train on {train:,}, to validate {val:,}, to test {test:,}")
    return 0
