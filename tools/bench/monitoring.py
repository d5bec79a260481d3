"""The share of monitoring and idle search hooks in a training step, in processor time.

    python tools/bench/monitoring.py --report results/bench_monitoring.md

Two gloo ranks of one thread train the recommender at its default sizes on tiny data, with a swap search and a placement
search that are configured but never due, and with the layer's times taken every ten steps, as is the default. Every
call of monitoring and of a hook is timed by the processor time of the thread that trains, which other processes do not
disturb and which does not count waiting; what other threads of the process spend, TensorBoard's and gloo's, is shown
beside it. Wall-clock differences of two runs could not show less than 1 % on a shared machine.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from dist_moe.config.plain_yaml import yaml_text
from dist_moe.engine import training as loop_module
from dist_moe.engine.health.alarm import RouterAlarm
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.engine.launch.signals import StopRequest
from dist_moe.engine.monitor.monitor import Monitor
from dist_moe.engine.monitor.step_window import StepWindow
from dist_moe.engine.monitor.tables import RouterPictures
from dist_moe.engine.training import Trainer
from dist_moe.layer import MoE
from dist_moe.layer import moe as layer_module
from dist_moe.parallel import PhaseClock, Traffic
from dist_moe.recipes.callbacks.placement import PlacementCallback
from dist_moe.recipes.callbacks.swap_search import SwapScheduleConfig
from dist_moe.recipes.recipe import plan_new_run
from dist_moe.recording import Recorder
from dist_moe.search import SlotTable
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.pool import on_ranks

RANKS = 2
MONITORING: list[tuple[Any, str]] = [
    (Monitor, "steps"),
    (StepWindow, "add"),
    (StepWindow, "reduce"),
    (Traffic, "add"),
    (Traffic, "counts"),
    (PhaseClock, "start"),
    (PhaseClock, "stop"),
    (PhaseClock, "mark"),
    (layer_module, "timed"),
    (PhaseClock, "enter"),
    (loop_module, "name_times"),
    (loop_module, "add_sums"),
    (loop_module, "describe_load"),
    (loop_module, "describe_speed"),
    (loop_module, "record_memory"),
    (RouterAlarm, "on_records"),
    (RouterPictures, "after_step"),
    (RouterPictures, "on_records"),
]
HOOKS: list[tuple[Any, str]] = [
    (MoE, "begin_step"),
    (MoE, "end_step"),
    (SlotTable, "begin_step"),
    (PlacementCallback, "before_step"),
    (PlacementCallback, "after_step"),
    (SwapScheduleConfig, "due"),
]
NEVER = 10**6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--steps", type=int, default=60, help="the first 10 are not counted")
    parser.add_argument("--batch", type=int, default=256, help="examples of a step, over both ranks")
    options = parser.parse_args()
    page = table(options)
    print(page)
    if options.report is not None:
        options.report.write_text(page, encoding="utf-8")


def table(options: argparse.Namespace) -> str:
    """Markdown: the share of the step that each kind takes, on the first rank (which writes) and on the other."""
    with tempfile.TemporaryDirectory() as directory:
        config = _write_config(Path(directory), options)
        of_ranks = on_ranks(RANKS, train_and_measure, config, Path(directory) / "run")
    rows = [
        f"| {rank} | {_percent(of['monitoring'], of['step'])} | {_percent(of['hooks'], of['step'])} "
        f"| {_percent(of['other threads'], of['step'])} |"
        for rank, of in enumerate(of_ranks)
    ]
    return "\n".join(
        [
            "# What monitoring and idle search hooks cost",
            "",
            f"`python tools/bench/monitoring.py --steps {options.steps} --batch {options.batch}`: {RANKS} ranks of one "
            f"thread, {os.cpu_count()} cores; recommender at its default sizes, COMET gates, batch {options.batch}, "
            "metrics of every step collected every 10 steps, TensorBoard and metrics.jsonl, times of the layer every "
            "10 steps, a swap search and a placement search that are never due. Processor time of the training thread; "
            "shares of that of all steps but the first 10.",
            "",
            "| rank | monitoring | search hooks, idle | other threads: TensorBoard's writer, gloo |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f} %"


def _write_config(directory: Path, options: argparse.Namespace) -> Path:
    root = write_tiny_movielens(directory / "raw", users=400, items=300)
    never = {"every_epochs": float(NEVER)}
    content = {
        "data": {"root": str(root), "cache": str(directory / "cache")},
        "model": {"gate": {"name": "comet", "k": 2}},
        "parallel": {"expert_parallel_size": RANKS},
        "swap_search": never,
        "placement": {"every_steps": NEVER},
        "train": {
            "epochs": 1000,
            "max_steps": options.steps,
            "batch_size": options.batch,
            "checkpoint_every": NEVER,
            "validate_every": NEVER,
        },
    }
    path = directory / "config.yaml"
    path.write_text(yaml_text(content), encoding="utf-8")
    return path


class _Spent:
    """Processor seconds of the training thread inside calls of one kind, nested ones once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def within(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            started, self._depth = time.thread_time(), self._depth + 1
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.thread_time() - started

        return timed


def train_and_measure(config: Path, run: Path) -> dict[str, float]:
    """On every rank: processor seconds of the counted steps by what they were spent on."""
    monitoring, hooks = _Spent(), _Spent()
    for spent, places in ((monitoring, MONITORING), (hooks, HOOKS)):
        for owner, name in places:
            setattr(owner, name, spent.within(getattr(owner, name)))
    marks: list[tuple[float, float, float, float]] = []
    step, warm_up = Trainer._train_step, 10

    def marked(self: Trainer, recorder: Recorder) -> None:
        if self.step >= warm_up:
            marks.append((time.thread_time(), time.process_time(), monitoring.seconds, hooks.seconds))
        step(self, recorder)

    Trainer._train_step = marked  # type: ignore[method-assign]
    plan = plan_new_run(config, [], run)
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        plan.start.run.create()
        assert not plan.config.recipe.train_in_groups(plan, groups, StopRequest()).fit.interrupted
    of_thread, of_process, of_monitoring, of_hooks = np.subtract(marks[-1], marks[0])
    return {
        "step": float(of_thread),
        "monitoring": float(of_monitoring),
        "hooks": float(of_hooks),
        "other threads": float(of_process - of_thread),
    }


if __name__ == "__main__":
    main()
