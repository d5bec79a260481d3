"""dist-moe: the command line. A mistake of the user's prints one message and exits with code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import dist_moe
from dist_moe.cli import bench, config, data, evaluate, export, import_, inspect, plan, reshard, search, sweep, train
from dist_moe.errors import UserError

COMMANDS = (train, evaluate, search, sweep, plan, config, data, inspect, export, import_, reshard, bench)


def console_script() -> None:
    """Run the command line, and end the process with its exit code."""
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, return the exit code."""
    try:
        options = _parse(arguments)
        return int(options.run(options))
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"dist-moe: {error}", file=sys.stderr)
        return error.exit_code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand before and after options, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    stray = [argument for argument in rest if argument.startswith("-") or "overrides" not in options]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dist-moe", description="Distributed training of sparse mixtures of experts.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {dist_moe.__version__}")
    # The deepspeed launcher puts this before the arguments of its own accord.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser
