"""Learning-rate schedules at every ZeRO stage: those that are allowed, and one whose whole state is a count.

Every allowed schedule is a function of its configuration and of the number of steps that it has taken. So a checkpoint
keeps that number alone: a resumed run builds the schedule of its own configuration and lets it take as many steps,
which brings back every value that it sets in every parameter group (rates, betas, momentum) bit for bit, and lets a
changed configuration take effect. A step takes some microseconds: a resume after a million steps some seconds.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dist_moe.engine.deepspeed.config import DeepSpeedSection, import_deepspeed
from dist_moe.engine.deepspeed.kinds import (
    ABOVE_0,
    AT_LEAST_0,
    BELOW_1,
    FLAG,
    UP_TO_1,
    Kind,
    check_parameters,
    number,
    one_of,
    several,
    suggestion,
    whole,
    written,
)
from dist_moe.engine.deepspeed.optimizers import optimizer_on_two_numbers, take_step
from dist_moe.errors import UserError

FIRST_STEPS = 8
"""Steps that every schedule takes on trial, with its optimizer."""
TRIAL_STEPS = 20_000
"""Steps of a run, at most, that its schedule takes on trial without the optimizer."""

_COUNT = whole(1)
_WARM_UP = {"warmup_num_steps": _COUNT, "warmup_type": one_of("log", "linear")}
_RATES_OF_WARM_UP = {"warmup_min_lr": AT_LEAST_0, "warmup_max_lr": AT_LEAST_0}
_CYCLED_MOMENTUM = {"cycle_momentum": FLAG, "base_momentum": BELOW_1, "max_momentum": BELOW_1}

SCHEDULES: dict[str, dict[str, Kind]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": AT_LEAST_0,
        "lr_range_test_step_size": _COUNT,
        "lr_range_test_step_rate": AT_LEAST_0,
        "lr_range_test_staircase": FLAG,
    },
    "OneCycle": {
        "cycle_min_lr": AT_LEAST_0,
        "cycle_max_lr": AT_LEAST_0,
        "decay_lr_rate": AT_LEAST_0,
        "cycle_first_step_size": _COUNT,
        "cycle_second_step_size": _COUNT,
        "cycle_first_stair_count": whole(0),
        "cycle_second_stair_count": whole(0),
        "decay_step_size": whole(0),
        "cycle_momentum": FLAG,
        "cycle_min_mom": BELOW_1,
        "cycle_max_mom": BELOW_1,
        "decay_mom_rate": number("that is finite", lambda _: True),
    },
    "WarmupLR": _RATES_OF_WARM_UP | _WARM_UP,
    "WarmupDecayLR": {"total_num_steps": _COUNT} | _RATES_OF_WARM_UP | _WARM_UP,
    "WarmupCosineLR": {"total_num_steps": _COUNT, "warmup_min_ratio": UP_TO_1, "cos_min_ratio": UP_TO_1} | _WARM_UP,
    "StepLR": {"step_size": _COUNT, "gamma": AT_LEAST_0},
    "MultiStepLR": {"milestones": several(_COUNT), "gamma": AT_LEAST_0},
    "ConstantLR": {"factor": UP_TO_1, "total_iters": _COUNT},
    "LinearLR": {
        "start_factor": number("above 0, at most 1", lambda v: 0 < v <= 1),
        "end_factor": UP_TO_1,
        "total_iters": _COUNT,
    },
    "ExponentialLR": {"gamma": AT_LEAST_0},
    "PolynomialLR": {"total_iters": _COUNT, "power": AT_LEAST_0},
    "CosineAnnealingLR": {"T_max": _COUNT, "eta_min": AT_LEAST_0},
    "CosineAnnealingWarmRestarts": {"T_0": _COUNT, "T_mult": _COUNT, "eta_min": AT_LEAST_0},
    "CyclicLR": {
        "base_lr": AT_LEAST_0,
        "max_lr": AT_LEAST_0,
        "step_size_up": _COUNT,
        "step_size_down": _COUNT,
        "mode": one_of("triangular", "triangular2", "exp_range"),
        "gamma": AT_LEAST_0,
        **_CYCLED_MOMENTUM,
    },
    "OneCycleLR": {
        "max_lr": ABOVE_0,
        "total_steps": _COUNT,
        "epochs": _COUNT,
        "steps_per_epoch": _COUNT,
        "pct_start": UP_TO_1,
        "anneal_strategy": one_of("cos", "linear"),
        "div_factor": ABOVE_0,
        "final_div_factor": ABOVE_0,
        "three_phase": FLAG,
        **_CYCLED_MOMENTUM,
    },
}
"""The parameters of every allowed schedule, DeepSpeed's first, then torch's: each has been trained with, saved and
resumed at every ZeRO stage by a test that walks this list."""

_NEEDS_A_FUNCTION = "it needs a function, which a configuration cannot hold"
_HOLDS_SCHEDULES = "it needs other schedules, which a configuration cannot hold"
REFUSED_SCHEDULES = {
    "LambdaLR": _NEEDS_A_FUNCTION,
    "MultiplicativeLR": _NEEDS_A_FUNCTION,
    "SequentialLR": _HOLDS_SCHEDULES,
    "ChainedScheduler": _HOLDS_SCHEDULES,
    "ReduceLROnPlateau": "it follows a metric, and schedules follow steps here",
    "SWALR": "nothing averages weights here",
}
"""torch's schedules that are refused, with the reason of each."""


class Schedule:
    """The schedule of a DeepSpeed section over the parameter groups of an optimizer, which it changes in place.

    ``steps``: taken so far, those that were skipped not counted. Without ``scheduler`` in the section it counts only.
    """

    def __init__(self, section: DeepSpeedSection, groups: list[dict[str, Any]]) -> None:
        self.steps = 0
        self._schedule = None
        if "scheduler" in section:
            kind = _class_of(section["scheduler"]["type"])
            self._schedule = kind(_GroupsAlone(groups), **section["scheduler"].get("params", {}))

    @property
    def longest(self) -> float:
        """The number of steps after which it can take no other."""
        total: float = getattr(self._schedule, "total_steps", math.inf)
        return total

    def step(self) -> None:
        """Set the values of the next step of the optimizer."""
        if self._schedule is not None:
            self._schedule.step()
        self.steps += 1

    def advance_to(self, steps: int) -> None:
        """Take steps until ``steps`` have been taken."""
        if self._schedule is None:
            self.steps = steps
        while self.steps < steps:
            self.step()


class _GroupsAlone(torch.optim.Optimizer):
    """Parameter groups as an optimizer that has nothing else: what a schedule looks at.

    At ZeRO stages 1 to 3 DeepSpeed's optimizers hold the groups, and are none of torch's.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.defaults = {key: value for key, value in groups[0].items() if key != "params"}
        self._opt_called = True  # torch warns where a schedule steps before its optimizer has

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: torch wraps it to see whether it was called."""


def first_states(section: DeepSpeedSection) -> dict[str, Any]:
    """Return the states that the section's optimizer, under its schedule, has of a parameter after a first step.

    The parameter has two elements; Adam is torch's.
    """
    optimizer = optimizer_on_two_numbers(section)
    Schedule(section, optimizer.param_groups)  # one that cycles the momentum may add a state
    return take_step(optimizer)


def check_schedule(section: DeepSpeedSection) -> None:
    """Raise UserError unless the section's schedule is allowed, its parameters fit, and it can take a few steps.

    The section's optimizer must have passed its check.
    """
    scheduler = section.get("scheduler")
    if scheduler is None:
        return
    name, params = scheduler.get("type"), scheduler.get("params", {})
    if name in REFUSED_SCHEDULES:
        raise UserError(
            f"deepspeed.scheduler.type={name} is refused: {REFUSED_SCHEDULES[name]}; allowed are {', '.join(SCHEDULES)}"
        )
    if not isinstance(name, str) or name not in SCHEDULES:
        raise UserError(
            f"deepspeed.scheduler.type={written(name)} is refused: there is no such one; {suggestion(name, SCHEDULES)}"
        )
    check_parameters("scheduler.params", params, SCHEDULES[name], name)
    optimizer = optimizer_on_two_numbers(section)
    if params.get("cycle_momentum") and not optimizer.param_groups[0].keys() & {"betas", "momentum"}:
        raise UserError(
            f"deepspeed.scheduler.params.cycle_momentum=true: {section['optimizer']['type']} has no momentum; "
            "set it to false"
        )
    try:
        schedule = Schedule(section, optimizer.param_groups)
        for _ in range(int(min(FIRST_STEPS, schedule.longest))):
            _check_values(section, optimizer.param_groups, schedule.steps)
            take_step(optimizer)
            schedule.step()
        _check_values(section, optimizer.param_groups, schedule.steps)
    except UserError:
        raise
    except Exception as error:  # whatever torch and DeepSpeed say to values that they cannot use
        raise UserError(f"deepspeed.scheduler.params={written(params)} do not suit {name}: {error!r}") from error


def check_length_of_schedule(section: DeepSpeedSection, total_steps: int) -> None:
    """Raise UserError where the section's schedule cannot set sensible values for every step of a run.

    Looks at TRIAL_STEPS steps at most. The schedule must have passed :func:`check_schedule`.
    """
    if "scheduler" not in section:
        return
    optimizer = optimizer_on_two_numbers(section)
    schedule = Schedule(section, optimizer.param_groups)
    if total_steps > schedule.longest:
        raise UserError(
            f"deepspeed.scheduler.type={section['scheduler']['type']} ends after {schedule.longest} steps and the run "
            f"takes {total_steps}; set deepspeed.scheduler.params.total_steps={total_steps} or train.max_steps"
        )
    for step in range(min(total_steps, TRIAL_STEPS)):
        _check_values(section, optimizer.param_groups, step)
        schedule.step()


def check_changes_have_effect(before: DeepSpeedSection, after: DeepSpeedSection) -> None:
    """Raise UserError for a parameter of the optimizer that was changed, and that the schedule overwrites.

    ``before``, ``after``: the sections of a run and of its resumption, both checked.
    """
    old, new = (section["optimizer"].get("params", {}) for section in (before, after))
    if "scheduler" not in after or before["optimizer"]["type"] != after["optimizer"]["type"]:
        return
    for key in sorted(old.keys() | new.keys()):
        undone = {name: value for name, value in new.items() if name != key} | ({key: old[key]} if key in old else {})
        alone = {"optimizer": after["optimizer"]}, {"optimizer": after["optimizer"] | {"params": undone}}
        both = [section | {"scheduler": after["scheduler"]} for section in alone]
        if _first_values(alone[0]) != _first_values(alone[1]) and _first_values(both[0]) == _first_values(both[1]):
            raise UserError(
                f"deepspeed.optimizer.params.{key}={written(new.get(key))} was {written(old.get(key))}, and the change "
                f"has no effect: {after['scheduler']['type']} sets it; change deepspeed.scheduler.params"
            )


def _first_values(section: DeepSpeedSection) -> list[dict[str, Any]]:
    """Return the values of the parameter group in each of the first steps; ``initial_lr`` is only torch's own note."""
    optimizer = optimizer_on_two_numbers(section)
    (group,) = optimizer.param_groups
    schedule, values = Schedule(section, [group]), []
    for _ in range(int(min(FIRST_STEPS, schedule.longest))):
        values.append({key: value for key, value in group.items() if key not in ("params", "initial_lr")})
        schedule.step()
    return values


def _check_values(section: DeepSpeedSection, groups: list[dict[str, Any]], step: int) -> None:
    (group,) = groups
    betas = group.get("betas", (group.get("momentum", 0.0),))
    if not (0 <= group["lr"] < math.inf and all(0 <= beta < 1 for beta in betas)):
        raise UserError(
            f"deepspeed.scheduler.params={written(section['scheduler'].get('params', {}))}: after {step} steps the "
            f"learning rate is {group['lr']} and the momentum {betas[0]}; rates must be finite and >= 0, momentum "
            ">= 0 and below 1"
        )


def _class_of(name: str) -> Any:
    ours = import_deepspeed().runtime.lr_schedules
    return getattr(ours if name in ours.VALID_LR_SCHEDULES else torch.optim.lr_scheduler, name)
