"""Rows of S that are pruned while training: against plain torch, in every layout, over restarts, to the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.callbacks import Callback
from dist_moe.engine.checkpoint.files import newest_checkpoint
from dist_moe.engine.deepspeed.migration import migrate
from dist_moe.engine.deepspeed.parameter_state import read_parameter_state
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import Trainer, fit
from dist_moe.errors import UserError
from dist_moe.parallel import Placement
from dist_moe.recipes.merge_compress.prune import LowRankPruningConfig, RowPruning, least_important
from tests.helpers.fits import EXPERTS, ROWS, Model, Rows, objective
from tests.helpers.pool import on_ranks

STEPS, RANK = 12, 2
ADAM = {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.1, "betas": (0.9, 0.999)}
PRUNING = LowRankPruningConfig(rank=RANK, remaining=0.25, beta=0.7, warm_up=2, hold=3)
MATRICES = ("up", "down")
SETTINGS = TrainConfig(epochs=100, max_steps=STEPS, batch_size=ROWS, checkpoint_every=1000)


@dataclass(frozen=True)
class Case:
    ranks: int
    ep: int
    stage: int
    accumulation: int = 1
    pruning: LowRankPruningConfig = PRUNING
    moves: bool = False


def small_model(groups: ProcessGroups) -> Model:
    """With S of numbers of its own: at first it is zero."""
    torch.manual_seed(4)
    model = Model(groups)
    bank = model.moe.experts
    bank.factor(RANK)
    generator = torch.Generator().manual_seed(1)
    for name in MATRICES:
        sparse = bank.get_parameter(f"{name}_sparse")
        every = torch.randn(EXPERTS, *sparse.shape[1:], generator=generator)
        sparse.data.copy_(every[list(bank.expert_ids)])
    return model


@dataclass(frozen=True)
class Course:
    """By step: ids of rows by matrix, (E, Q). At the end: importance by matrix; and this rank's masters and moments."""

    ids: list[dict[str, Tensor]]
    importance: dict[str, Tensor]
    experts: tuple[int, ...]
    states: dict[str, dict[str, Tensor]]


class Watch(Callback):
    """Takes down what there is after each step."""

    def __init__(self) -> None:
        self.ids: list[dict[str, Tensor]] = []
        self.states: dict[str, dict[str, Tensor]] = {}

    def after_step(self, trainer: Trainer, step: int) -> None:
        bank = trainer.model.moe.experts
        self.ids.append({name: bank.get_buffer(f"{name}_row_ids").clone() for name in MATRICES})
        state = read_parameter_state(trainer.engine)
        of_bank = {n: t for n, t in state.tensors.items() if ".experts." in n}
        self.states = {n: {k: x.clone() for k, x in t.items()} for n, t in of_bank.items()}


def run(
    case: Case, groups: ProcessGroups, run_dir: Path | None = None, end: int = STEPS, *, resume: bool = False
) -> Course:
    """On a rank: a fit that prunes, which ends after ``end`` steps."""
    section = {
        "optimizer": {"type": "AdamW", "params": dict(ADAM)},
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
        "gradient_accumulation_steps": case.accumulation,
    }
    watch, pruning, model = Watch(), RowPruning(case.pruning), small_model(groups)
    fit(
        model,
        Rows(groups.environment, accumulation=case.accumulation),
        objective,
        SETTINGS,
        deepspeed=section,
        callbacks=[pruning, watch, EndAfter(end), *([Move()] if case.moves else [])],
        trackers=(),
        run=None if run_dir is None else RunDirectory(run_dir),
        resume_from=newest_checkpoint(run_dir) if resume and run_dir is not None else None,
        groups=groups,
    )
    importance = {name.rpartition(".")[2]: s.importance_EQ for name, s in pruning._matrices.items()}
    return Course(watch.ids, importance, model.moe.experts.expert_ids, watch.states)


class Move(Callback):
    """Lets experts change their ranks in the middle of the pruning."""

    def after_step(self, trainer: Trainer, step: int) -> None:
        if step == 5:
            migrate(trainer.engine, trainer.model.moe, Placement((3, 0, 1, 2), 2))


class EndAfter(Callback):
    def __init__(self, steps: int) -> None:
        self._steps = steps

    def after_step(self, trainer: Trainer, step: int) -> None:
        if step == self._steps:
            trainer.end()


def runs(cases: list[Case]) -> list[Course]:
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=cases[0].ep)) as groups:
        return [run(case, groups) for case in cases]


def interrupted_and_not(case: Case, root: Path) -> list[Course]:
    """The courses of a run, and of what follows after the 6th step of another that began anew from there."""
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=case.ep)) as groups:
        whole = run(case, groups, root / "whole")
        run(case, groups, root / "cut", 6)
        return [whole, run(case, groups, root / "cut", resume=True)]


def naive(pruning: LowRankPruningConfig) -> Course:
    """Plain torch on whole batches, rows compared one by one; importance of the step's own S and gradient."""
    environment = LaunchEnvironment(rank=0, world_size=1, local_rank=0)
    with process_groups(LaunchEnvironment.read(), ParallelConfig()) as groups:
        model = small_model(groups)
    bank = model.moe.experts
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    weights = {name: bank.get_parameter(f"{name}_sparse") for name in MATRICES}
    rows = [(m, e, q) for m in MATRICES for e in range(EXPERTS) for q in range(weights[m].shape[2])]
    importance, left, ids = dict.fromkeys(rows, 0.0), list(rows), []
    start, end = int(pruning.warm_up), STEPS - int(pruning.hold)
    for step in range(1, STEPS + 1):
        (x_TD,) = Rows(environment).micro_batches(step - 1)
        optimizer.zero_grad()
        objective(model, x_TD).loss.backward()
        for m, e, q in rows if step <= end else ():
            grad = weights[m].grad
            assert grad is not None
            pairs = zip(weights[m][e, :, q].tolist(), grad[e, :, q].tolist(), strict=True)
            score = sum(abs(s * g) for s, g in pairs) / weights[m].shape[1]
            importance[m, e, q] = pruning.beta * importance[m, e, q] + (1 - pruning.beta) * score
        optimizer.step()
        share = 1.0 if step <= start else pruning.remaining
        if start < step < end:
            share += (1 - pruning.remaining) * (1 - (step - start) / (end - start)) ** 3
        pools = [rows]
        if pruning.scope == "matrix":
            pools = [[r for r in rows if r[:2] == (m, e)] for m in MATRICES for e in range(EXPERTS)]
        kept: list[tuple[str, int, int]] = []
        for pool in pools:
            there = sorted((r for r in pool if r in left), key=lambda r: importance[r], reverse=True)
            kept += there[: round(share * len(pool))]
        for m, e, q in set(left) - set(kept):
            with torch.no_grad():
                weights[m][e, :, q] = 0
                bank.get_buffer(f"{m}_row_ids")[e, q] = -1
                for moment in ("exp_avg", "exp_avg_sq"):
                    optimizer.state[weights[m]][moment][e, :, q] = 0
        left = kept
        ids.append({m: bank.get_buffer(f"{m}_row_ids").clone() for m in MATRICES})
    scores = {m: torch.tensor([importance[r] for r in rows if r[0] == m]).view(EXPERTS, -1) for m in MATRICES}
    states = {
        f"moe.experts.{n}": {"master": p.detach(), **{k: optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}}
        for n, p in bank.named_parameters()
    }
    return Course(ids, scores, tuple(range(EXPERTS)), states)


@cache
def reference(pruning: LowRankPruningConfig) -> Course:
    course: Course = on_ranks(1, naive, pruning)[0]
    return course


LAYOUTS = {
    1: [Case(1, 1, 0), Case(1, 1, 1, pruning=PRUNING.model_copy(update={"scope": "matrix"})), Case(1, 1, 3)],
    2: [Case(2, 1, 0), Case(2, 1, 2, accumulation=2), Case(2, 1, 3)],
    -2: [
        Case(2, 2, 1, moves=True),
        Case(2, 2, 2, pruning=PRUNING.model_copy(update={"scope": "matrix"})),
        Case(2, 2, 3),
    ],
    4: [Case(4, 2, 1), Case(4, 2, 3)],
    -4: [Case(4, 4, 1)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prunes_as_plain_torch_does_in_every_layout(layout: int) -> None:
    cases = LAYOUTS[layout]
    for rank, courses in enumerate(on_ranks(abs(layout), runs, cases)):
        for case, course in zip(cases, courses, strict=True):
            expected = reference(case.pruning)
            for step, (ours, theirs) in enumerate(zip(course.ids, expected.ids, strict=True), start=1):
                assert all(ours[name].equal(theirs[name]) for name in MATRICES), f"{case}, rank {rank}, step {step}"
            for name in MATRICES:
                torch.testing.assert_close(course.importance[name], expected.importance[name], rtol=1e-4, atol=1e-8)
            for name, states in course.states.items():
                for key, tensor in states.items():
                    wanted = expected.states[name][key][list(course.experts)]
                    torch.testing.assert_close(tensor, wanted, rtol=0, atol=2e-5, msg=f"{case} {name} {key}")
            left = {name: int((ids_EQ >= 0).sum()) for name, ids_EQ in course.ids[-1].items()}
            if case.pruning.scope == "global":
                assert sum(left.values()) == round(0.25 * EXPERTS * (6 + 4))
            else:
                assert left == {"up": EXPERTS * round(0.25 * 6), "down": EXPERTS * round(0.25 * 4)}
            for name in MATRICES:
                gone_EQ = course.ids[-1][name][list(course.experts)] < 0
                for tensor in course.states[f"moe.experts.{name}_sparse"].values():
                    assert not tensor.transpose(1, 2)[gone_EQ].any()
                    assert tensor.transpose(1, 2)[~gone_EQ].any(dim=1).all()


@pytest.mark.parametrize(("ranks", "ep", "stage"), [(1, 1, 1), (2, 2, 3)])
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(tmp_path: Path, ranks: int, ep: int, stage: int) -> None:
    for theirs, ours in on_ranks(ranks, interrupted_and_not, Case(ranks, ep, stage), tmp_path):
        assert len(ours.ids) == STEPS - 6
        assert all(a[name].equal(b[name]) for a, b in zip(ours.ids, theirs.ids[6:], strict=True) for name in MATRICES)
        assert all(ours.importance[name].equal(theirs.importance[name]) for name in MATRICES)
        for name, states in theirs.states.items():
            assert all(ours.states[name][key].equal(tensor) for key, tensor in states.items()), name


def test_the_schedule_is_a_cubic_between_warm_up_and_hold() -> None:
    config = LowRankPruningConfig(remaining=0.1, warm_up=0.1, hold=20)
    assert config.between(100) == (10, 80)
    shares = [config.share_at(step, 100) for step in range(101)]
    assert shares[:11] == [1.0] * 11
    assert shares[80:] == [0.1] * 21
    assert shares[45] == pytest.approx(0.1 + 0.9 * (1 - 35 / 70) ** 3)
    assert all(a > b for a, b in pairwise(shares[10:81]))
    with pytest.raises(UserError, match=r"warm_up=60, hold=0.5: no step of 100 is left"):
        LowRankPruningConfig(warm_up=60, hold=0.5).between(100)


def test_of_equal_rows_the_last_go_first_and_none_comes_back() -> None:
    left = torch.tensor([True, True, False, True, True, True])
    mask = least_important(torch.tensor([1.0, 0.5, 9.0, 0.5, 0.5, 2.0]), left, 0.5)
    assert mask.tolist() == [False, False, False, True, True, False]
    assert not least_important(torch.ones(6), left, 1.0).any()
    assert least_important(torch.ones(6), left, 0.0).equal(left)


def refused(held: bool) -> str:
    with process_groups(LaunchEnvironment.read(), ParallelConfig()) as groups:
        model: nn.Module = small_model(groups) if held else Model(groups)
        options: dict[str, Any] = {"trained": ["head.*"]} if held else {}
        with pytest.raises(UserError) as refusal:
            fit(
                model,
                Rows(groups.environment),
                objective,
                SETTINGS,
                callbacks=[RowPruning(PRUNING)],
                trackers=(),
                groups=groups,
                **options,
            )
    return str(refusal.value)


def test_experts_that_are_whole_or_held_are_refused() -> None:
    assert on_ranks(1, refused, False) == [
        "model.low_rank: no expert has rows that could be pruned; give rank, and rows=null"
    ]
    assert "up is not trained" in on_ranks(1, refused, True)[0]
