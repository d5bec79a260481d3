"""``dist-moe search``: swap search on a finished run, written out as a run of its own."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dist_moe.config.files import write_json
from dist_moe.engine.checkpoint.files import checkpoints_of
from dist_moe.engine.checkpoint.loading import copy_with_buffers
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.run_lock import held
from dist_moe.errors import UserError
from dist_moe.parallel import wait_for_all
from dist_moe.recipes.callbacks.swap_search import search_swaps
from dist_moe.recipes.supervised.evaluate import TrainedRun, trained_run
from dist_moe.search import SwapSearchConfig
from dist_moe.tasks.evaluation import evaluate

REPORT = "swap_search.json"


def search_run(
    run_dir: Path, output: Path, config: SwapSearchConfig, *, allow_changed_data: bool = False
) -> dict[str, Any]:
    """Search the tables of a run on its validation examples; write ``output``, a run with the tables found.

    ``output`` holds the run's configuration, a checkpoint that differs in the tables only (and
    in that a stage of permutation learning is over), and a report.
    Returns the report. Collective, at any number of ranks. Raises UserError if the run is not intact, if
    ``output`` holds a run already, and for other data than it was trained on unless ``allow_changed_data``.
    """
    environment = LaunchEnvironment.read()
    found = RunDirectory(output)
    with held(output, environment, option="--output"), ExitStack() as stack:
        if environment.is_rank_zero:
            found.check_unused("--output")
        run = stack.enter_context(trained_run(run_dir, allow_changed_data=allow_changed_data))
        if not run.model.tables:
            raise UserError(f"{run_dir}: model.name={run.config.model.name} has no slot -> expert table to search")
        run.model.end_learning()
        before = _metrics(run)
        swaps = search_swaps(run.task, run.model, config, run.config.target_weights, environment)
        after = _metrics(run)
        report = {
            "checkpoint": run.checkpoint.name,
            "changed_data": run.changed_data,
            "search": config.model_dump() | {"examples": min(config.examples, len(run.task.val))},
            "losses": swaps.losses,
            "swaps": [{"layer": swap.layer, "row": swap.row, "slots": swap.slots} for swap in swaps.swaps],
            "screened": swaps.screened,
            "verified": swaps.verified,
            "local_optimum": swaps.local_optimum,
            "test_before": before,
            "test_after": after,
        }
        if environment.is_rank_zero:
            _write(run, run_dir, found, report)
        wait_for_all()
    return report


def _metrics(run: TrainedRun) -> dict[str, Any]:
    return evaluate(run.task, run.model, run.task.test, run.config.target_weights, run.groups)


def _write(run: TrainedRun, run_dir: Path, found: RunDirectory, report: dict[str, Any]) -> None:
    tables = {
        f"{layer}.slot_map.{name}": buffer
        for layer, table in run.model.tables.items()
        for name, buffer in table.named_buffers()
    }
    copy_with_buffers(run.checkpoint, checkpoints_of(found.root), tables)
    source = RunDirectory(run_dir)
    for file in (source.environment, source.identity):
        if file.is_file():
            shutil.copy(file, found.root)
    write_json(found.root / REPORT, report)
    found.describe(run.config.plain(), LaunchEnvironment())  # last: its presence makes it a run
