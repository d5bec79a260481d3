"""The parser's list of commands, and the arguments that several of them share."""

from __future__ import annotations

import argparse
from typing import Any, TypeAlias

from dist_moe.config.packaged import config_path

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


CONFIG_HELP = "a YAML file, or @NAME for one that the package has ('dist-moe config --list')"


def add_config(command: argparse.ArgumentParser, name: str = "config", **options: Any) -> None:
    """Add an argument that names a configuration; see :func:`config_path`."""
    command.add_argument(name, type=config_path, **{"help": CONFIG_HELP} | options)


def add_changed_data(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a run meet other data than it was trained on."""
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="go on though the data, tokenizer or start weights are not those of the run; what differs is recorded",
    )
