"""dist-moe evaluate: test metrics of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_moe.cli.commands import Commands, add_changed_data
from dist_moe.config.files import json_text


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    evaluate = commands.add_parser("evaluate", help="test metrics of a run, from its best or newest checkpoint")
    evaluate.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="a run, one of its checkpoints, or a file of 'dist-moe export'"
    )
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="model.gate.FIELD=VALUE",
        help="evaluate with other options of the gate, for example at another number of experts per token: "
        "model.gate.k=1 (top_k, ada_moe), model.gate.evaluation_k=4 (smoe_dropout)",
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_changed_data(evaluate)
    evaluate.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.engine.launch.environment import LaunchEnvironment
    from dist_moe.recipes.supervised.evaluate import evaluate_run
    from dist_moe.recipes.supervised.report import metrics_table, predictor_rows

    result = evaluate_run(options.run_dir, options.overrides, allow_changed_data=options.allow_changed_data)
    if LaunchEnvironment.read().is_rank_zero:
        table = metrics_table(result["test"], predictor_rows(result["baselines"]))
        print(json_text(result).rstrip() if options.json else f"{result['checkpoint']}\n{table}")
    return 0
