"""Trials of a sweep: each a run of its own, or many in one stack."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from dist_moe.engine.launch.environment import LaunchEnvironment, disable_malloc_trim, stop_requests
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.errors import UserError
from dist_moe.recipes.recipe import RunStart
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.recipe import Stopped, SupervisedRecipe
from dist_moe.sweeps.runner import Report, TrialResult
from dist_moe.sweeps.stacked import stack_fault, stack_key, train_stack
from dist_moe.tasks.task import Task


def run_trials(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Train ``configs``: one alone through the engine as ``dist-moe train`` does, several in stacks.

    Raises UserError if several were asked for and one of them cannot be stacked.
    """
    disable_malloc_trim()
    if len(configs) == 1:
        return [_run_alone(configs[0], report)]
    for config in configs:
        if fault := stack_fault(config):
            raise UserError(f"trials_together={len(configs)}: {fault}; set trials_together: 1")
    return _run_in_stacks(configs, report)


def _run_in_stacks(configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    stacks: dict[str, list[int]] = defaultdict(list)
    for i, config in enumerate(configs):
        stacks[stack_key(config)].append(i)
    results: list[TrialResult | None] = [None] * len(configs)
    for members in stacks.values():
        task = configs[members[0]].data.open(progress=True)
        for i, result in zip(members, _run_stack(task, configs, members, report), strict=True):
            results[i] = result
    return results


def _run_stack(
    task: Task, configs: Sequence[SupervisedConfig], members: list[int], report: Report
) -> list[TrialResult | None]:
    def report_member(place: int, step: int, loss: float) -> bool:
        return report(members[place], step, loss)

    found = train_stack(task, [configs[i] for i in members], report_member)
    return [None if one is None else TrialResult(*one) for one in found]


def _run_alone(config: SupervisedConfig, report: Report) -> TrialResult | None:
    """Train in a run directory that is dropped again, as is what it prints: a sweep has too many to keep."""
    with tempfile.TemporaryDirectory(prefix="dist-moe-trial-") as directory:
        root = Path(directory)
        start = RunStart(config, RunDirectory(root / "run"), LaunchEnvironment.read())
        recipe = config.recipe
        assert isinstance(recipe, SupervisedRecipe), "a sweep refuses other recipes"
        plan = recipe.plan(start)
        start.run.create()
        try:
            with (
                (root / "log").open("w") as log,
                redirect_stdout(log),
                redirect_stderr(log),
                process_groups(start.environment, config.parallel) as groups,
                stop_requests() as stop,
            ):
                result = recipe.train_in_groups(plan, groups, stop, lambda step, loss: report(0, step, loss))
        except Stopped:
            return None
        if result.val is None:
            raise KeyboardInterrupt
        return TrialResult(_numbers(result.val), _numbers(result.test or {}), result.fit.steps)


def _numbers(figures: dict[str, object]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if isinstance(value, (int, float))}
