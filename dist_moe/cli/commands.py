"""The parser's list of commands."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_changed_data(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a run meet other data than it was trained on."""
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="go on though the data, tokenizer or start weights are not those of the run; what differs is recorded",
    )
