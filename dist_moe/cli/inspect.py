"""dist-moe inspect: what is inside a run directory, a checkpoint or an exported file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dist_moe.cli.commands import Commands


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    inspect = commands.add_parser(
        "inspect",
        help="show what checkpoints hold, and check every digest",
        description="Show steps, layouts, parameters and sizes, and check every digest. Ends with code 2 if "
        "anything is damaged.",
    )
    inspect.add_argument("path", type=Path, metavar="RUN_DIR|CHECKPOINT|FILE.safetensors")
    inspect.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.engine.checkpoint.inspection import inspect_path
    from dist_moe.engine.monitor.run_directory import RunDirectory
    from dist_moe.recipes.supervised.runs import result_of

    found = inspect_path(result_of(RunDirectory(options.path)).root)
    print(found.text)
    for error in found.errors:
        print(f"dist-moe: {error}", file=sys.stderr)
    return 2 if found.errors else 0
