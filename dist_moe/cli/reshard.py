"""dist-moe reshard: a checkpoint with another number of expert files."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    reshard = commands.add_parser(
        "reshard",
        help="rewrite a checkpoint with another number of expert files",
        description="Rewrite the newest checkpoint of a run, or the one named, with its experts in another number of "
        "files, as a run directory of its own. To train or evaluate at another number of ranks no "
        "resharding is needed: every checkpoint loads at any layout. One expert is in memory at a time.",
    )
    reshard.add_argument("source", type=Path, metavar="RUN_DIR|CHECKPOINT")
    reshard.add_argument("--output", type=Path, required=True, metavar="DIR", help="the run directory to write")
    reshard.add_argument("--expert-files", type=int, required=True, metavar="N", help="from 1 to the number of experts")
    reshard.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.recipes.supervised.runs import reshard_run

    final = reshard_run(options.source, options.output, options.expert_files)
    print(f"{final}: {options.expert_files} expert file(s), every tensor compared with its source")
    return 0
