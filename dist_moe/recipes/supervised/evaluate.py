"""The evaluation of a run from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.engine.deepspeed.config import cast_parameters
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ProcessGroups, process_groups
from dist_moe.models import MoEModel
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.runs import Weights, check_same_data, find_weights, for_evaluation
from dist_moe.recipes.supervised.size import check_model
from dist_moe.tasks import Task, build_model, evaluate, evaluate_baselines


@dataclass(frozen=True)
class TrainedRun:
    """A finished or stopped run, brought back: its model holds the weights of ``checkpoint``, in the precision
    in which the run computed. ``changed_data``: the names of what differs from the data that it was trained on."""

    config: SupervisedConfig
    task: Task
    model: MoEModel
    checkpoint: Path
    groups: ProcessGroups
    changed_data: list[str]


Check = Callable[[SupervisedConfig, MoEModel], None]
"""Raises UserError for a run that cannot be used, by its configuration and its model, which may be without storage."""


@contextmanager
def trained_run(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    allow_changed_data: bool = False,
    check: Check = lambda config, model: None,
) -> Iterator[TrainedRun]:
    """Open a run, a checkpoint or an exported file at any number of ranks; see :func:`find_weights`.

    ``overrides``: of options of its gate, see :func:`for_evaluation`. ``check``: before any process group exists, if
    the model can be built without storage. Collective. Raises UserError if it is not intact, for an override that is
    not among those, and for other data than it was trained on unless ``allow_changed_data``.
    """
    environment = LaunchEnvironment.read()
    weights = find_weights(run_dir)
    config = for_evaluation(weights.config, overrides)
    task = config.data.open(progress=environment.is_rank_zero)
    rehearsed = check_model(config, task)
    if rehearsed is not None:
        check(config, rehearsed)
    changed = check_same_data(run_dir, weights, task, allowed=allow_changed_data)
    with process_groups(environment, config.parallel.nearest_for(environment.world_size)) as groups:
        run = opened_run(weights, config, task, groups, changed)
        if rehearsed is None:
            check(config, run.model)
        yield run


def opened_run(
    weights: Weights, config: SupervisedConfig, task: Task, groups: ProcessGroups, changed_data: list[str]
) -> TrainedRun:
    """Return the run with the model of ``config`` in its precision, holding ``weights``, this rank's experts."""
    model = build_model(config, task, groups.world).to(groups.device)
    cast_parameters(model, config.deepspeed, groups.device)  # before the masters come, which are rounded to it
    weights.load(model)
    return TrainedRun(config, task, model, weights.path, groups, changed_data)


def evaluate_run(run_dir: Path, overrides: Sequence[str] = (), *, allow_changed_data: bool = False) -> dict[str, Any]:
    """Return test metrics of a run, a checkpoint or an exported file, at any number of ranks. Collective.

    They are those of the run's summary, to the bit at its layout and to the rounding of its precision at others; with
    ``overrides``, those that its gate gives with other options. Raises UserError as :func:`trained_run` does.
    """
    with trained_run(run_dir, overrides, allow_changed_data=allow_changed_data) as run:
        weights = run.config.target_weights
        return {
            "checkpoint": run.checkpoint.name,
            "changed_data": run.changed_data,
            "test": evaluate(run.task, run.model, run.task.test, weights, run.groups),
            "baselines": evaluate_baselines(run.task, run.task.test, weights),
        }
