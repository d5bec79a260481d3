"""dist-moe import: a run that starts from exported weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add_parser(
        "import",
        help="make a run that starts from the weights of 'dist-moe export'",
        description="Make a run directory whose step 0 has the weights and buffers of FILE, in fp32, and no optimizer "
        "state; 'dist-moe train --resume RUN_DIR' trains it from the first step on.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.safetensors")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="where the run is to be")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of its configuration to change")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.recipes.weights import import_weights

    checkpoint, exported = import_weights(options.file, options.run_dir, options.overrides)
    print(
        f"{checkpoint}: {exported.dtype} weights of step {exported.step} as fp32 masters, without optimizer state: "
        f"moments begin at zero and the schedule at its start; now: dist-moe train --resume {options.run_dir}"
    )
    return 0
