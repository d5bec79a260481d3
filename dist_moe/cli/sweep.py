"""dist-moe sweep: many trials, and their report."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands, add_changed_data, add_config


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    sweep = commands.add_parser(
        "sweep",
        help="train many trials with drawn hyper-parameters, and report",
        description="Begin a sweep or go on with it; when all trials are done, write its report.",
    )
    add_config(sweep, "file", metavar="SWEEP")
    sweep.add_argument("--workers", type=int, default=1, metavar="N", help="processes that train (default: 1)")
    sweep.add_argument("--sweep-dir", type=Path, metavar="DIR", help="where to write (default: runs/sweeps/SWEEP)")
    sweep.add_argument("--retry-failed", action="store_true", help="try trials again that an error ended")
    sweep.add_argument("--report-only", action="store_true", help="train nothing, write the report anew")
    sweep.add_argument("--runner", metavar="MODULE:FUNCTION", help="what trains the trials, if not this package")
    add_changed_data(sweep)
    sweep.set_defaults(run=_run, output_is_optional=True)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.sweeps import DEFAULT_RUNNER
    from dist_moe.sweeps.command import report_sweep, run_sweep

    if options.report_only:
        return report_sweep(options.file, options.sweep_dir)
    runner = options.runner or DEFAULT_RUNNER
    allow = options.allow_changed_data
    return run_sweep(
        options.file, options.workers, options.sweep_dir, options.retry_failed, runner, allow_changed_data=allow
    )
