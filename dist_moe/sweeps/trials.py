"""Trials of a sweep: each a run of its own, or many in one stack."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from dist_moe.engine.launch.environment import LaunchEnvironment, disable_malloc_trim
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.engine.launch.signals import stop_requests
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.errors import DivergedError, UserError
from dist_moe.recipes.recipe import RunStart
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.recipe import Stopped, SupervisedRecipe
from dist_moe.sweeps.runner import OBJECTIVE, Report, TrialResult
from dist_moe.sweeps.stacked import stack_error, stack_key, train_stack
from dist_moe.tasks.evaluation import check_parts, check_selection


def run_trials(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Train ``configs``: one alone through the engine as ``dist-moe train`` does, several in stacks.

    Raises UserError if several were asked for and one of them cannot be stacked.
    """
    disable_malloc_trim()
    if len(configs) == 1:
        return [_run_alone(configs[0], report)]
    for config in configs:
        if error := stack_error(config):
            raise UserError(f"trials_together={len(configs)}: {error}; set trials_together: 1")
    stacks: dict[str, list[int]] = defaultdict(list)
    for i, config in enumerate(configs):
        stacks[stack_key(config)].append(i)
    results: list[TrialResult | None] = [None] * len(configs)
    for members in stacks.values():

        def report_member(place: int, step: int, loss: float, members: list[int] = members) -> bool:
            return report(members[place], step, loss)

        task = configs[members[0]].data.open(progress=True)
        check_parts(task)
        for i in members:
            check_selection(task, configs[i].target_weights, "the sweep")
        found = train_stack(task, [configs[i] for i in members], report_member)
        for i, result in zip(members, found, strict=True):
            results[i] = result
    return results


def _run_alone(config: SupervisedConfig, report: Report) -> TrialResult | None:
    """Train in a run directory that is dropped again, as is what it prints: a sweep has too many to keep."""
    with tempfile.TemporaryDirectory(prefix="dist-moe-trial-") as directory:
        root = Path(directory)
        start = RunStart(config, RunDirectory(root / "run"), LaunchEnvironment.read())
        recipe = config.recipe
        assert isinstance(recipe, SupervisedRecipe), "a sweep refuses other recipes"
        plan = recipe.plan(start)
        check_selection(plan.task, config.target_weights, "the sweep")
        start.run.create()
        try:
            with (
                (root / "log").open("w", encoding="utf-8") as log,
                redirect_stdout(log),
                redirect_stderr(log),
                process_groups(start.environment, config.parallel) as groups,
                stop_requests() as stop,
            ):
                result = recipe.train_in_groups(plan, groups, stop, lambda step, loss: report(0, step, loss))
        except Stopped:
            return None
        except DivergedError as error:
            nothing = {OBJECTIVE: math.nan}
            return TrialResult(nothing, nothing, error.step)
        if result.val is None:
            raise KeyboardInterrupt
        val, test = (
            {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
            for metrics in (result.val, result.test or {})
        )
        return TrialResult(val, test, result.fit.steps)
