"""dist-moe search: swaps of experts after training."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands, add_changed_data


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    search = commands.add_parser(
        "search",
        help="local search by swaps over the experts of a finished run",
        description="Exchange experts between slots while that lowers the loss on validation examples, and write "
        "the result as a run of its own. Works at any number of ranks, for any gate.",
    )
    search.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    search.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="examples=2048 max_swaps=50 ...; see 'dist-moe config --fields swap_search'",
    )
    search.add_argument("--output", type=Path, metavar="DIR", help="where to write (default: RUN_DIR-search)")
    add_changed_data(search)
    search.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.config.validation import validate_section
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.recipes.supervised.report import metrics_table
    from dist_moe.recipes.supervised.search import search_run
    from dist_moe.search import SwapSearchConfig

    config = validate_section(SwapSearchConfig, options.overrides)
    run_dir = options.run_dir.resolve()
    output = options.output or run_dir.with_name(f"{run_dir.name}-search")
    report = search_run(run_dir, output, config, allow_changed_data=options.allow_changed_data)
    if LaunchEnvironment.read().is_rank_zero:
        first, last = report["losses"][0], report["losses"][-1]
        ending = "no swap helps any more" if report["local_optimum"] else "the budget is spent"
        print(
            f"loss on {report['search']['examples']:,} validation examples {first:.6g} -> {last:.6g} by "
            f"{len(report['swaps'])} swap(s): {report['screened']} screened, {report['verified']} verified; {ending}"
        )
        print(metrics_table(report["test_after"], {"before the search": report["test_before"]}))
        print(f"written to {output}")
    return 0
