"""Every field of the DeepSpeed section with every kind of wrong value: a sentence at once, or two steps of training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dist_moe.engine.deepspeed.checks import FIELDS, check_deepspeed_section
from dist_moe.engine.deepspeed.config import import_deepspeed, parameter_dtype
from dist_moe.engine.deepspeed.optimizers import OPTIMIZERS, REFUSED_OPTIMIZERS, check_optimizer
from dist_moe.engine.deepspeed.schedules import REFUSED_SCHEDULES, SCHEDULES, check_schedule
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import fit
from dist_moe.errors import UserError
from tests.helpers.fits import ROWS, Model, Rows, objective
from tests.helpers.pool import on_ranks

NAN, INF = float("nan"), float("inf")
NUMBERS = [NAN, INF, -INF, -1, -1e-9, 0, 1, 2, 0.5, 2.5, 5e8, 2**31 - 1, 2**31, 2**63 - 1, 10**400, 1e-320, 1e308]
OTHERS = [None, True, False, "auto", "yes", "false", "1e-3", "", "x" * 10**6, [], [0.9], {}, {"a": 1}, object]
LISTS = [[0.9, NAN], [0.9, 1], [0.5, 0.6], [2, 1], ["a", "b"], [1, 2.5], [True, 1], (1, 2), [10**400, 1]]
VALUES: list[Any] = [*NUMBERS, *OTHERS, *LISTS]

NEEDED: dict[str, dict[str, Any]] = {
    "OneCycle": {"cycle_min_lr": 0.0, "cycle_max_lr": 0.1},
    "WarmupDecayLR": {"total_num_steps": 9},
    "WarmupCosineLR": {"total_num_steps": 9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2]},
    "ExponentialLR": {"gamma": 0.5},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 5},
    "CyclicLR": {"base_lr": 0.0, "max_lr": 0.1},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 9},
}
"""Parameters that a schedule cannot do without."""


def base(stage: int = 1) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 1000}
    return {"optimizer": {"type": "SGD", "params": {"lr": 0.01}}, "zero_optimization": zero}


def with_field(field: str, value: Any, stage: int = 1) -> dict[str, Any]:
    section = copy.deepcopy(base(stage))
    *above, last = field.split(".")
    inner = section
    for key in above:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return section


def fields_with_values(stage: int = 1) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for field in FIELDS:
        if not field.startswith(("optimizer.", "scheduler.")):
            for value in VALUES:
                yield field, value, with_field(field, value, stage)


def optimizers_with_values(stage: int = 1) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for name, kinds in OPTIMIZERS.items():
        for key in kinds:
            for value in VALUES:
                section = base(stage) | {"optimizer": {"type": name, "params": {"lr": 0.01} | {key: value}}}
                yield f"optimizer.params.{key}", value, section


def schedules_with_values(stage: int = 1) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for name, kinds in SCHEDULES.items():
        for key in kinds:
            for value in VALUES:
                params = NEEDED.get(name, {}) | {key: value}
                yield "scheduler.params", value, base(stage) | {"scheduler": {"type": name, "params": params}}


def walk(
    cases: Iterator[tuple[str, Any, dict[str, Any]]], check: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Check every case; each is refused within a second by a sentence that names the field, or is returned."""
    accepted, refused, slowest = [], 0, 0.0
    for field, value, section in cases:
        started = time.process_time()
        try:
            check(section)
            accepted.append(section)
        except UserError as error:
            refused += 1
            sentence = str(error)
            named = field in sentence or ("optimizer" in field and "optimizer.params" in sentence)
            assert named or "train.batch_size" in sentence, (field, value, sentence)
            assert len(sentence) < 2000, (field, value)
        slowest = max(slowest, time.process_time() - started)
        assert value != "auto" or section not in accepted, field
        assert not (isinstance(value, float) and value != value and section in accepted), field
    print(f"{refused} refused, {len(accepted)} accepted, slowest {slowest:.3f} s")
    assert slowest < 1.0
    return accepted


def check_all(section: dict[str, Any]) -> None:
    check_deepspeed_section(section, batch_size=ROWS, world_size=1)


WALKS = {
    "fields": (fields_with_values, check_all),
    "optimizers": (optimizers_with_values, check_optimizer),
    "schedules": (schedules_with_values, check_schedule),
}


@pytest.mark.parametrize("name", WALKS)
def test_wrong_values_are_refused_at_once(name: str) -> None:
    cases, check = WALKS[name]
    assert walk(cases(), check)


@pytest.mark.parametrize("field", FIELDS)
def test_auto_is_refused_by_name(field: str) -> None:
    with pytest.raises(UserError, match=rf"deepspeed\.{field}=auto is refused: nothing fills it in"):
        check_all(with_field(field, "auto"))


@pytest.mark.parametrize(
    "section",
    [
        with_field("optimizer.params.lr", "auto"),
        base() | {"scheduler": {"type": "StepLR", "params": {"gamma": "Auto"}}},
    ],
)
def test_auto_of_a_parameter_is_refused_by_name(section: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"params\.\w+=auto is refused: nothing fills it in"):
        check_all(section)


@pytest.mark.parametrize("value", ["auto", "false", "yes", 1, 0, "true", []])
def test_an_evaluation_reads_no_other_precision_than_the_training(value: Any) -> None:
    for name in ("bf16", "fp16"):
        section = with_field(f"{name}.enabled", value)
        with pytest.raises(UserError, match=f"{name}.enabled"):
            check_all(section)
        with pytest.raises(UserError, match=f"{name}.enabled"):
            parameter_dtype(section)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimization.overlap_com", "overlap_comm"),
        ("zero_optimization.prefetch_bucket_size", "stage3_prefetch_bucket_size"),
        ("bf16.enable", "enabled"),
        ("optimizer.parameters", "params"),
        ("zero_optimization.offload_optimizer.devise", "device"),
        ("data_types.param_dtype", ""),
        ("anything", ""),
        ("optimizer.params.wd", ""),
        ("optimizer.params.momentun", "momentum"),
    ],
)
def test_an_unknown_key_is_refused_with_what_it_looks_like(key: str, near: str) -> None:
    with pytest.raises(UserError, match=rf"deepspeed\.{key}: .* no such") as error:
        check_all(with_field(key, 1.0))
    assert (f"did you mean {near}?" in str(error.value)) == bool(near)
    assert "Allowed are" in str(error.value)


def names_of(module: Any, base_class: type) -> set[str]:
    return {n for n, one in vars(module).items() if isinstance(one, type) and issubclass(one, base_class)}


def test_every_optimizer_is_allowed_or_refused_with_a_reason() -> None:
    torchs = names_of(torch.optim, torch.optim.Optimizer) - {"Optimizer"}
    assert torchs <= OPTIMIZERS.keys() | REFUSED_OPTIMIZERS.keys()
    for name in [*REFUSED_OPTIMIZERS, *map(str.lower, REFUSED_OPTIMIZERS)]:
        with pytest.raises(UserError, match=f"optimizer.type={name} is refused: .* allowed are AdamW"):
            check_all(with_field("optimizer", {"type": name}))
    with pytest.raises(UserError, match=r"optimizer.type=sgd is refused: .* did you mean SGD\?"):
        check_all(with_field("optimizer", {"type": "sgd"}))


def test_every_schedule_is_allowed_or_refused_with_a_reason() -> None:
    torchs = {n for n in names_of(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler) if n[0] != "_"}
    deepspeeds = set(import_deepspeed().runtime.lr_schedules.VALID_LR_SCHEDULES)
    assert (torchs | deepspeeds) - {"LRScheduler"} <= SCHEDULES.keys() | REFUSED_SCHEDULES.keys()
    for name in REFUSED_SCHEDULES:
        with pytest.raises(UserError, match=f"scheduler.type={name} is refused: .* allowed are"):
            check_all(with_field("scheduler", {"type": name}))
    with pytest.raises(UserError, match=r"scheduler.type=steplr is refused: .* did you mean StepLR\?"):
        check_all(with_field("scheduler", {"type": "steplr"}))


def train(sections: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Two steps of each section; what ends otherwise than by a sentence."""
    failures = []
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=1)) as groups:
        for section in sections:
            torch.manual_seed(0)
            feed = Rows(groups.environment, accumulation=section.get("gradient_accumulation_steps", 1))
            settings = TrainConfig(max_steps=2, batch_size=ROWS)
            try:
                fit(Model(groups), feed, objective, settings, deepspeed=section, trackers=(), groups=groups)
            except UserError:
                pass
            except Exception as error:
                failures.append((section, repr(error)))
    return failures


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", WALKS)
def test_what_is_accepted_trains(name: str, stage: int) -> None:
    cases, check = WALKS[name]
    (failures,) = on_ranks(1, train, walk(cases(stage), check))
    assert failures == []
