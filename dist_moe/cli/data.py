"""dist-moe data: fetch and prepare data sets, and say what is in a table."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from dist_moe.cli.commands import Commands
from dist_moe.errors import UserError


class DataSets:
    """The names of all data sets, looked up when they are asked for: that imports them all."""

    def __iter__(self) -> Iterator[str]:
        from dist_moe.data import DATA

        return iter(DATA.names)


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    data = commands.add_parser("data", help="fetch and prepare data sets, look at tables")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    fetch = verbs.add_parser("fetch", help="fetch and prepare a data set, once")
    fetch.add_argument("name", choices=DataSets(), metavar="NAME", help="%(choices)s")
    fetch.add_argument("--data-root", type=Path, metavar="DIR", help="directory of the original files")
    fetch.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="of labelled texts and questions: the BERT checkpoint whose tokenizer cuts them",
    )
    fetch.add_argument("overrides", nargs="*", metavar="data.FIELD=VALUE", help="fields of the section 'data'")
    fetch.set_defaults(run=_run)
    inspect = verbs.add_parser(
        "inspect",
        help="guess what the columns of a table are",
        description="Print a section 'data' of a configuration, to be edited, for a table in CSV or Parquet.",
    )
    inspect.add_argument("path", type=Path, metavar="FILE|DIR")
    inspect.add_argument("--target", action="append", default=[], metavar="COLUMN", help="to predict; repeatable")
    inspect.add_argument("--separator", default=",", metavar="CHARACTER", help="of cells in CSV; default: a comma")
    inspect.set_defaults(run=_inspect)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.config.overrides import assign, parse_overrides
    from dist_moe.config.validation import validate
    from dist_moe.data import DATA

    settings = DATA.by_name[options.name]
    if any(field.is_required() for field in settings.model_fields.values()):
        raise UserError(f"{options.name} is prepared when it is trained on; 'dist-moe data inspect FILE' describes it")
    given = {"name": options.name}
    for key, value in parse_overrides(options.overrides).items():
        if not key.startswith("data."):
            raise UserError(f"{key}={value}: only fields of the section data can be given, such as data.seed=1")
        assign(given, key.removeprefix("data."), value)
    if options.data_root is not None:
        given["root"] = options.data_root
    if options.encoder is not None:
        if "encoder" not in settings.model_fields:
            raise UserError(
                f"--encoder={options.encoder} is for texts that a BERT reads, and {options.name} is none of them"
            )
        given["encoder"] = options.encoder
    print(validate(settings, given).fetch(progress=True))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from dist_moe.data.tables.files import SEPARATOR
    from dist_moe.data.tables.infer import inferred_schema

    if not re.search(SEPARATOR, options.separator):
        raise UserError(f"--separator={options.separator!r} is not one character of ASCII but a quote; a tab is $'\\t'")
    print(inferred_schema(options.path, options.target, options.separator), end="")
    return 0
