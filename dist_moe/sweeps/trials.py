"""Trials of a sweep: each a run of its own, or many in one stack."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import yaml

from dist_moe.engine.launch.host_memory import keep_freed_memory
from dist_moe.errors import UserError
from dist_moe.recipes.supervised.config import RunConfig
from dist_moe.recipes.supervised.plan import plan_new_run
from dist_moe.recipes.supervised.train import Stopped, train
from dist_moe.sweeps.runner import Report, TrialResult
from dist_moe.sweeps.stacked import stack_fault, stack_key, train_stack
from dist_moe.tasks.open import open_task
from dist_moe.tasks.task import Task


def run_trials(configs: Sequence[RunConfig], report: Report) -> list[TrialResult | None]:
    """Train ``configs``: one alone through the engine as ``dist-moe train`` does, several in stacks.

    Raises UserError if several were asked for and one of them cannot be stacked.
    """
    keep_freed_memory()
    if len(configs) == 1:
        return [_run_alone(configs[0], report)]
    for config in configs:
        if fault := stack_fault(config):
            raise UserError(f"trials_together={len(configs)}: {fault}; set trials_together: 1")
    return _run_in_stacks(configs, report)


def _run_in_stacks(configs: Sequence[RunConfig], report: Report) -> list[TrialResult | None]:
    stacks: dict[str, list[int]] = defaultdict(list)
    for i, config in enumerate(configs):
        stacks[stack_key(config)].append(i)
    results: list[TrialResult | None] = [None] * len(configs)
    for members in stacks.values():
        task = open_task(configs[members[0]], progress=True)
        for i, result in zip(members, _run_stack(task, configs, members, report), strict=True):
            results[i] = result
    return results


def _run_stack(
    task: Task, configs: Sequence[RunConfig], members: list[int], report: Report
) -> list[TrialResult | None]:
    def report_member(place: int, step: int, loss: float) -> bool:
        return report(members[place], step, loss)

    found = train_stack(task, [configs[i] for i in members], report_member)
    return [None if one is None else TrialResult(*one) for one in found]


def _run_alone(config: RunConfig, report: Report) -> TrialResult | None:
    """In a run directory that is dropped again, as is what it prints: a sweep has too many to keep."""
    root = Path(tempfile.mkdtemp(prefix="dist-moe-trial-"))
    try:
        (root / "trial.yaml").write_text(yaml.safe_dump(config.plain()))
        plan = plan_new_run(root / "trial.yaml", (), root / "run")
        try:
            with (root / "log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
                train(plan, on_validation=lambda step, loss: report(0, step, loss))
        except Stopped:
            return None
        summary = json.loads(plan.run.summary.read_text())
        val, test = (_numbers(summary[part]) for part in ("val", "test"))
        return TrialResult(val, test, summary["steps"])
    finally:
        shutil.rmtree(root)


def _numbers(figures: dict[str, object]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if isinstance(value, (int, float))}
