"""dist-moe report: runs side by side, and what their experts see, in one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands, add_changed_data
from dist_moe.errors import UserError


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    report = commands.add_parser(
        "report",
        help="draw runs side by side, and what their experts see, into one HTML file",
        description="Write a page that needs no server and no network: curves, metrics beside simple predictors, load "
        "of experts, what each expert sees, time and bytes, environment and configuration. Each run has one of its own "
        "when it ends, without what experts see, for which the model is asked anew.",
    )
    report.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first run")
    report.add_argument("--no-atlas", action="store_true", help="leave out what experts see: the files alone are read")
    report.add_argument("--hf", type=Path, metavar="DIR", help="instead of runs: a Hugging Face mixture")
    report.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="of --hf: text files, each a kind of text")
    add_changed_data(report)
    report.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.report import REPORT, report_of_hugging_face, report_of_runs

    if (options.hf is None) == (not options.runs):
        raise UserError("name runs, or --hf DIR with --text FILE...")
    if options.hf is None:
        if options.text:
            raise UserError("--text goes with --hf: what a run's experts see are its test examples")
        output = options.output or options.runs[0] / REPORT
        atlas = not options.no_atlas
        report_of_runs(options.runs, output, atlas=atlas, allow_changed_data=options.allow_changed_data)
    else:
        if not options.text:
            raise UserError("--hf needs --text FILE...: text whose tokens the experts are to see")
        output = options.output or Path(REPORT)
        report_of_hugging_face(options.hf, options.text, output)
    print(f"written to {output}")
    return 0
