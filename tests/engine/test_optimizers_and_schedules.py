"""A walk over the lists of optimizers and schedules: each is trained, saved, and resumed at every ZeRO stage."""

from __future__ import annotations

import itertools
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.engine.callbacks import Callback
from dist_moe.engine.checkpoint.contents import check_contents
from dist_moe.engine.checkpoint.files import checkpoints_of, read_manifest, step_directory
from dist_moe.engine.deepspeed.optimizers import OPTIMIZERS
from dist_moe.engine.deepspeed.parameter_state import read_parameter_state
from dist_moe.engine.deepspeed.schedules import SCHEDULES, check_changes_have_effect, check_length_of_schedule
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import Trainer, fit
from dist_moe.errors import UserError
from tests.helpers.fits import ROWS, Model, Rows, objective
from tests.helpers.pool import on_ranks

STEPS, SAVED_AT = 6, 3
STAGES = range(4)
CELLS_AT_ONCE = 32

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "AdamW": [
        {"weight_decay": 0.1},
        {"amsgrad": True, "fused": False, "betas": [0.8, 0.9]},
        {"foreach": True, "maximize": True},
    ],
    "Adam": [{"adam_w_mode": False, "weight_decay": 0.1}],
    "Adadelta": [{"lr": 1.0}],
    "Adamax": [{}],
    "ASGD": [{"t0": 2}],
    "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "RAdam": [{"betas": [0.5, 0.6]}],
    "RMSprop": [{}, {"momentum": 0.5, "centered": True}],
    "Rprop": [{}],
    "SGD": [{"momentum": 0.9, "nesterov": True}, {}, {"momentum": 0.5, "dampening": 0.5, "fused": True}],
}
"""Options of every optimizer; those of the product first."""
PARAMETERS: dict[str | None, dict[str, Any]] = {
    None: {},
    "LRRangeTest": {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 2},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05, "cycle_first_step_size": 4, "decay_lr_rate": 0.1},
    "WarmupLR": {"warmup_max_lr": 0.05, "warmup_num_steps": 5},
    "WarmupDecayLR": {"total_num_steps": 6, "warmup_max_lr": 0.05, "warmup_num_steps": 3},
    "WarmupCosineLR": {"total_num_steps": 6, "warmup_num_steps": 2},
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "MultiStepLR": {"milestones": [1, 4, 4], "gamma": 0.5},
    "ConstantLR": {"factor": 0.5, "total_iters": 4},
    "LinearLR": {"start_factor": 0.1, "total_iters": 5},
    "ExponentialLR": {"gamma": 0.7},
    "PolynomialLR": {"total_iters": 7, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.05, "step_size_up": 2, "mode": "exp_range", "gamma": 0.9},
    "OneCycleLR": {"max_lr": 0.05, "total_steps": STEPS},
}
CYCLING, WITHOUT_MOMENTUM = {"CyclicLR", "OneCycleLR"}, {"Adadelta", "ASGD", "Rprop"}
"""What these schedules cycle, unless told otherwise, is what these optimizers do not have."""


@dataclass(frozen=True)
class Cell:
    """An optimizer, one of its VARIANTS, a schedule, and the stages of a run and of its resumption."""

    optimizer: str
    schedule: str | None
    stage: int
    then: int
    variant: int = 0

    def section(self, stage: int, **changes: Any) -> dict[str, Any]:
        """The DeepSpeed section at ``stage``."""
        params = {"lr": 0.02} | VARIANTS[self.optimizer][self.variant]
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000}
        section = {"optimizer": {"type": self.optimizer, "params": params}, "zero_optimization": zero}
        if self.schedule is not None:
            section["scheduler"] = {"type": self.schedule, "params": PARAMETERS[self.schedule]}
        return section | changes

    @property
    def suits(self) -> bool:
        """Whether the schedule finds what it cycles."""
        return not (self.schedule in CYCLING and self.optimizer in WITHOUT_MOMENTUM)


@dataclass
class Course(Callback):
    """Everything that a run computes with, after so many steps: states, values of the parameter groups, losses."""

    states: dict[int, dict[str, Tensor | float]] = field(default_factory=dict)
    values: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    def on_start(self, trainer: Trainer) -> None:
        self.after_step(trainer, trainer.step)

    def after_step(self, trainer: Trainer, step: int) -> None:
        state = read_parameter_state(trainer.engine)
        tensors = {f"{n}|{k}": t.detach().clone() for n, of_one in state.tensors.items() for k, t in of_one.items()}
        self.states[step] = tensors | state.scalars
        self.values[step] = [
            {key: tuple(value) if isinstance(value, list) else value for key, value in group.items() if key != "params"}
            for group in trainer.engine.optimizer.param_groups
        ]

    def on_records(self, trainer: Trainer, records: list[Mapping[str, Any]]) -> None:
        self.losses |= {record["step"]: record["loss"] for record in records}


def course(groups: ProcessGroups, section: Mapping[str, Any], run: Path | None, resume_from: Path | None) -> Course:
    taken = Course()
    torch.manual_seed(0)
    settings = TrainConfig(
        max_steps=STEPS, batch_size=ROWS, checkpoint_every=SAVED_AT, async_checkpoints=False, keep_checkpoints=9
    )
    fit(
        Model(groups),
        Rows(groups.environment),
        objective,
        settings,
        deepspeed=section,
        callbacks=[taken],
        trackers=(),
        run=None if run is None else RunDirectory(run),
        resume_from=resume_from,
        groups=groups,
        keep_model=False,
    )
    return taken


def distance(one: Mapping[str, Tensor | float], other: Mapping[str, Tensor | float]) -> float:
    """The largest difference of two states; infinite where they have other names."""
    if one.keys() != other.keys():
        return float("inf")
    return max(float((torch.as_tensor(one[name]) - torch.as_tensor(other[name])).abs().max()) for name in one)


def faults_of(cell: Cell, groups: ProcessGroups, root: Path) -> list[str]:
    """What differs between a run, and the same run saved and resumed, at its stage and at the cell's other."""
    whole = course(groups, cell.section(cell.stage), root, None)
    saved = step_directory(checkpoints_of(root), SAVED_AT)
    check_contents(saved, read_manifest(saved), values=True)
    faults = ["it learns nothing"] if len(set(whole.losses.values())) < STEPS else []
    if cell.schedule is not None and len({values[0]["lr"] for values in whole.values.values()}) < 2:
        faults.append("its rate never changes")
    for stage in dict.fromkeys((cell.stage, cell.then)):
        resumed = course(groups, cell.section(stage), None, saved)
        if distance(resumed.states[SAVED_AT], whole.states[SAVED_AT]) != 0:
            faults.append(f"stage {stage}: states are not those that were saved")
        later = range(SAVED_AT, STEPS + 1)
        if {step: resumed.values[step] for step in later} != {step: whole.values[step] for step in later}:
            faults.append(f"stage {stage}: {resumed.values} are not {whole.values}")
        apart = distance(resumed.states[STEPS], whole.states[STEPS])
        if apart > (0 if stage == cell.stage else 1e-5):
            faults.append(f"stage {stage}: states are {apart} apart at the end")
        losses = {step: loss for step, loss in whole.losses.items() if step > SAVED_AT}
        if stage == cell.stage and resumed.losses != losses:
            faults.append(f"stage {stage}: losses {resumed.losses} are not {losses}")
    return faults


def walk(cells: Iterable[Cell], ep: int = 1) -> dict[Cell, list[str]]:
    """The faults of all cells, on this rank."""
    faults: dict[Cell, list[str]] = {}
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups:
        for cell in cells:
            with tempfile.TemporaryDirectory() as own:
                paths: list[Any] = [own]
                torch.distributed.broadcast_object_list(paths)
                try:
                    faults[cell] = faults_of(cell, groups, Path(paths[0]))
                except UserError as error:
                    faults[cell] = ["refused: " + str(error)]
                except Exception:
                    faults[cell] = ["failed: " + traceback.format_exc()]
    return faults


def check(cells: list[Cell], world: int = 1, ep: int = 1) -> None:
    """Walk over cells, CELLS_AT_ONCE; those that suit have no fault, and the others are refused."""
    seen: Counter[str] = Counter()
    for first in range(0, len(cells), CELLS_AT_ONCE):
        for results in on_ranks(world, walk, cells[first : first + CELLS_AT_ONCE], ep):
            seen.update("bit-equal" if not faults else faults[0].split(":")[0] for faults in results.values())
            assert {cell: faults for cell, faults in results.items() if faults and cell.suits} == {}
            for cell, faults in results.items():
                assert cell.suits or "momentum" in faults[0], (cell, faults)
    print(f"{len(cells)} cells on {world} ranks:", dict(seen))


def stages(number: int) -> tuple[int, int]:
    """Every pair of stages in turn."""
    return number % 4, (number + 1 + number // 4) % 4


def test_the_walk_is_over_the_whole_lists() -> None:
    assert VARIANTS.keys() == OPTIMIZERS.keys()
    assert PARAMETERS.keys() - {None} == SCHEDULES.keys()


def test_every_optimizer_and_every_schedule() -> None:
    optimizers = [(name, variant) for name, variants in VARIANTS.items() for variant in range(len(variants))]
    cells = [Cell(name, None, *stages(i), variant) for i, (name, variant) in enumerate(optimizers)]
    cells += [
        Cell("AdamW" if schedule in ("OneCycle", "CyclicLR") else "SGD", schedule, *stages(i))
        for i, schedule in enumerate(SCHEDULES)
    ]
    check(cells)


def rates_after_a_change(cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[list[float], list[float]]]:
    """Rates of the steps after a resumption with another section; and of a run that had it from the start."""
    rates = []
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=1)) as groups:
        for before, after in cases:
            with tempfile.TemporaryDirectory() as own:
                course(groups, before, Path(own), None)
                resumed = course(groups, after, None, step_directory(checkpoints_of(Path(own)), SAVED_AT))
            always = course(groups, after, None, None)
            later = range(SAVED_AT, STEPS + 1)
            rates.append(tuple([one.values[step][-1]["lr"] for step in later] for one in (resumed, always)))
    return rates


def test_a_changed_schedule_or_rate_takes_effect_as_if_it_had_always_been_so() -> None:
    def changed(name: str | None, stage: int, params: dict[str, Any], lr: float = 0.02) -> dict[str, Any]:
        section = Cell("SGD", name, 0, 0).section(stage, optimizer={"type": "SGD", "params": {"lr": lr}})
        return section | ({} if name is None else {"scheduler": {"type": name, "params": params}})

    half = {"step_size": 2, "gamma": 0.5}
    cases = [
        (changed("StepLR", 0, half), changed("StepLR", 0, half | {"step_size": 5})),
        (changed("StepLR", 0, half), changed("StepLR", 1, half, lr=0.5)),
        (changed("CosineAnnealingLR", 0, {"T_max": 9}), changed("CosineAnnealingLR", 2, {"T_max": 4})),
        (changed("StepLR", 3, half), changed("ExponentialLR", 0, {"gamma": 0.9})),
        (changed("StepLR", 1, half), changed(None, 1, {})),
        (changed(None, 0, {}), changed("WarmupLR", 3, {"warmup_num_steps": 6, "warmup_type": "linear"})),
    ]
    (rates,) = on_ranks(1, rates_after_a_change, cases)
    for resumed, always in rates:
        assert resumed == always
    assert len({tuple(resumed) for resumed, _ in rates}) == len(cases)


@pytest.mark.parametrize(
    ("schedule", "key", "value", "overwritten"),
    [
        ("OneCycle", "lr", 0.5, True),
        ("CyclicLR", "lr", 0.5, True),
        ("OneCycle", "betas", [0.1, 0.2], True),
        ("OneCycle", "weight_decay", 0.5, False),
        ("OneCycle", "fused", True, False),
        ("StepLR", "lr", 0.5, False),
        (None, "lr", 0.5, False),
        (None, "eps", 1e-8, False),
    ],
)
def test_a_change_that_the_schedule_overwrites_is_refused(
    schedule: str | None, key: str, value: Any, overwritten: bool
) -> None:
    before = Cell("AdamW", schedule, 0, 0).section(0)
    after = before | {"optimizer": {"type": "AdamW", "params": before["optimizer"]["params"] | {key: value}}}
    check_changes_have_effect(before, before)
    if overwritten:
        with pytest.raises(UserError, match=rf"params\.{key}=.* the change has no effect: {schedule} sets it"):
            check_changes_have_effect(before, after)
    else:
        check_changes_have_effect(before, after)


def refusals(root: Path, sections: list[dict[str, Any]]) -> list[str]:
    """What is said to sections that would go on from a checkpoint of AdamW, before a model is built."""
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=1)) as groups:
        course(groups, Cell("AdamW", None, 1, 1).section(1), root, None)
        said = []
        for section in sections:
            with pytest.raises(UserError) as error:
                course(groups, section, None, step_directory(checkpoints_of(root), SAVED_AT))
            said.append(str(error.value))
    return said


def test_an_optimizer_with_other_states_is_refused_by_name(tmp_path: Path) -> None:
    others = [("SGD", {}), ("NAdam", {}), ("AdamW", {"amsgrad": True}), ("RMSprop", {"momentum": 0.9})]
    sections = [Cell("AdamW", None, 1, 1).section(1, optimizer={"type": n, "params": params}) for n, params in others]
    (said,) = on_ranks(1, refusals, tmp_path, sections)
    for (name, _), sentence in zip(others, said, strict=True):
        assert f"deepspeed.optimizer.type={name} cannot go on from" in sentence
        assert "the run's kept exp_avg, exp_avg_sq, step" in sentence


def test_a_run_longer_than_its_schedule_is_refused() -> None:
    section = Cell("SGD", "OneCycleLR", 1, 1).section(1)
    check_length_of_schedule(section, STEPS)
    with pytest.raises(UserError, match=f"OneCycleLR ends after {STEPS} steps and the run takes {STEPS + 1}"):
        check_length_of_schedule(section, STEPS + 1)
    growing = section | {"scheduler": {"type": "ExponentialLR", "params": {"gamma": 10.0}}}
    check_length_of_schedule(growing, 300)
    with pytest.raises(UserError, match="after 310 steps the learning rate is inf"):
        check_length_of_schedule(growing, 2_000)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", VARIANTS)
def test_all_of_the_product(optimizer: str) -> None:
    """Every schedule and option at every stage, resumed there and at each other stage in turn."""
    check(
        [
            Cell(optimizer, schedule, stage, (stage + 1 + number % 3) % 4, variant)
            for variant in range(len(VARIANTS[optimizer]))
            for number, schedule in enumerate(PARAMETERS)
            for stage in STAGES
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2])
def test_two_ranks(ep: int) -> None:
    pairs = itertools.product(VARIANTS, (None, "OneCycle", "CyclicLR", "MultiStepLR"), STAGES)
    check([Cell(name, schedule, stage, (stage + 1) % 4) for name, schedule, stage in pairs], world=2, ep=ep)
