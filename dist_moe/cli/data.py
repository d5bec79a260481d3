"""dist-moe data: fetch and prepare data sets."""

from __future__ import annotations

import argparse
from collections.abc import Sized
from pathlib import Path

from dist_moe.cli.commands import Commands
from dist_moe.errors import UserError

TABLES_AND_IMAGES = ("movielens-1m", "movielens-latest-small", "multi-fashion-mnist", "multi-mnist")
CORPORA = ("text", "brown")
LABELLED_TEXTS = (
    *("sentiment-movies", "sentiment-products", "sentiment-editorials", "sentiment-tweets"),
    *("trec", "sms-spam", "20-newsgroups"),
    *("cola", "sst-2", "mrpc", "sts-b", "qqp", "mnli", "mnli-mm", "qnli", "rte"),
)
QUESTIONS = ("squad-v2",)
DATA_SETS = TABLES_AND_IMAGES + CORPORA + LABELLED_TEXTS + QUESTIONS


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    data = commands.add_parser("data", help="fetch and prepare data sets")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    fetch = verbs.add_parser("fetch", help="fetch and prepare a data set, once")
    fetch.add_argument("name", choices=DATA_SETS, metavar="NAME", help=" | ".join(DATA_SETS))
    fetch.add_argument("--data-root", type=Path, metavar="DIR", help="directory of the original files")
    fetch.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="of labelled texts and questions: the BERT checkpoint whose tokenizer cuts them",
    )
    fetch.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.name in LABELLED_TEXTS:
        return _fetch_labelled_texts(options)
    if options.name in QUESTIONS:
        return _prepare_questions(options)
    if options.encoder is not None:
        raise UserError(
            f"--encoder={options.encoder} is for texts that a BERT reads, and {options.name} is none of them"
        )
    if options.name in CORPORA:
        from dist_moe.cli.data_text import fetch_text

        return fetch_text(options)
    from dist_moe.data.movielens.prepare import MovieLensConfig, prepare
    from dist_moe.data.two_images.prepare import TwoImagesConfig, prepare_two_images

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


def _fetch_labelled_texts(options: argparse.Namespace) -> int:
    from dist_moe.data.encoder import open_encoder
    from dist_moe.data.labelled_text import LabelledTextConfig, prepare_labelled_text

    config = LabelledTextConfig(name=options.name, root=options.data_root)
    config.check()
    texts = prepare_labelled_text(config, open_encoder(options.encoder).directory / "tokenizer.json")
    train, val, test = map(len, (texts.train, texts.val, texts.test))
    kinds = f"{len(texts.task.classes)} classes" if texts.task.classes else "a number to predict"
    tokens = sum(texts.manifest["tokens"].values())
    print(f"{options.name}: {kinds}, {tokens:,} tokens, to train on {train:,}, to validate {val:,}, to test {test:,}")
    return 0


def _prepare_questions(options: argparse.Namespace) -> int:
    from dist_moe.data.encoder import open_encoder
    from dist_moe.data.labelled_text import QuestionsConfig, prepare_questions

    config = QuestionsConfig(name=options.name, root=options.data_root)
    config.check()
    found = prepare_questions(config, open_encoder(options.encoder).directory / "tokenizer.json").manifest
    train, val, test = (
        f"{questions:,} in {windows:,} windows"
        for questions, windows in zip(found["questions"].values(), found["counts"].values(), strict=True)
    )
    print(f"{options.name}: questions to train on {train}, to validate {val}, to test {test}")
    return 0
