"""What trains the trials of a sweep: a function of this signature, named as 'module:function'."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from dist_moe.errors import UserError

if TYPE_CHECKING:
    from dist_moe.recipes.supervised.config import SupervisedConfig

DEFAULT_RUNNER = "dist_moe.sweeps.trials:run_trials"
OBJECTIVE = "loss"

Report = Callable[[int, int, float], bool]


@dataclass(frozen=True)
class TrialResult:
    """What one training came to. ``val`` and ``test``: metrics by name, "loss" among them.

    ``val["loss"]`` is what the study minimises; a trial that diverged has nan or inf there.
    ``steps``: optimiser steps taken.
    """

    val: dict[str, float]
    test: dict[str, float]
    steps: int


class TrialRunner(Protocol):
    """Trains ``configs``, together where there are several, and gives their results in that order.

    After each validation of ``configs[i]`` it calls ``report(i, step, val_loss)``; where that returns
    True, the trial is to stop, and its result is None.
    """

    def __call__(self, configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]: ...


def load_runner(name: str) -> TrialRunner:
    """The function 'module:function'; UserError if there is none."""
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UserError(f"--runner {name!r} is not of the form module:function, for example {DEFAULT_RUNNER}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"--runner {name}: {module_name} cannot be imported: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"--runner {name}: {module_name} has no function {function_name}")
    return cast(TrialRunner, function)
