"""Trials trained in one stack against the same trials trained one by one through the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.recipes.callbacks.swap_search import SwapScheduleConfig
from dist_moe.recipes.recipe import load_config
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.search import SearchReport, SlotTable
from dist_moe.sweeps import TrialResult
from dist_moe.sweeps.stacked import stack_error, stack_key, train_stack
from dist_moe.sweeps.trials import run_trials
from dist_moe.tasks.task import Task
from tests.helpers.pool import on_ranks
from tests.helpers.runs import train_all, write_config

LR = "deepspeed.optimizer.params.lr"
STEPS = 45
VALIDATE_EVERY = 15


def never(trial: int, step: int, loss: float) -> bool:
    return False


@pytest.fixture
def configured(tmp_path: Path, tiny_data: dict[str, str]) -> Callable[..., SupervisedConfig]:
    """A tiny run with overrides; patience is long enough for the best weights to matter."""
    train = {"max_steps": STEPS, "validate_every": VALIDATE_EVERY, "patience": 2}
    path = write_config(tmp_path, tiny_data, train=train)

    def configure(*overrides: str) -> SupervisedConfig:
        return load_config(path, overrides)

    return configure


def alone(config: SupervisedConfig, root: Path) -> dict[str, Any]:
    """The summary of a run of its own."""
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    on_ranks(1, train_all, root / "config.yaml", {str(root / "run"): []})
    return json.loads((root / "run" / "summary.json").read_text())


def stacked(
    configs: list[SupervisedConfig], report: Callable[[int, int, float], bool] = never
) -> list[TrialResult | None]:
    return train_stack(configs[0].data.open(progress=False), configs, report)


GATES = {
    "comet": [
        [f"{LR}=0.005", "model.gate.gamma=1"],
        [f"{LR}=0.002", "model.gate.gamma=3", "model.gate.entropy_weight=0.2"],
    ],
    "dselect_k": [[f"{LR}=0.005", "model.gate.gamma=1"], [f"{LR}=0.01", "model.gate.gamma=5"]],
    "top_k": [[f"{LR}=0.005"], [f"{LR}=0.02"]],
    "softmax": [[f"{LR}=0.005"], [f"{LR}=0.02"]],
    "hash": [[f"{LR}=0.005"], [f"{LR}=0.02"]],
    # Registered by a module of the user's own, which the configuration names.
    "nearest_test_gate": [
        [f"{LR}=0.005", "imports=[tests.sweeps.outside_gate]", f"model.gate.temperature={temperature}"]
        for temperature in (0.1, 0.7)
    ],
}


SEARCHES = ["none", "sinkhorn", "branches", "swap"]
FAST = [(name, search) for name in GATES for search in SEARCHES if search == "sinkhorn" or name == "comet"]


@pytest.mark.parametrize(
    ("name", "search"),
    [
        pytest.param(name, search, marks=() if (name, search) in FAST else pytest.mark.slow)
        for name in GATES
        for search in SEARCHES
        if search != "branches" or name in ("comet", "dselect_k")  # the others have one branch
    ],
)
def test_a_stack_is_its_trials_one_by_one(
    configured: Callable[..., SupervisedConfig], tmp_path: Path, name: str, search: str
) -> None:
    of_search = {
        "none": [[], []],
        "sinkhorn": [["model.permutation.epochs=0.3"], ["model.permutation.epochs=0.9"]],
        "branches": [[f"model.permutation={{epochs: {e}, per_branch: true, per_gate: true}}"] for e in (0.3, 0.9)],
        "swap": [["swap_search.examples=200", "swap_search.every_epochs=0.4", "swap_search.least_gain=0.001"]] * 2,
    }[search]
    configs = [
        configured(f"model.gate.name={name}", *of_gate, *more)
        for of_gate, more in zip(GATES[name], of_search, strict=True)
    ]
    together = assert_as_alone(configs, tmp_path)
    assert together[0] != together[1]


def assert_as_alone(configs: list[SupervisedConfig], directory: Path) -> list[TrialResult | None]:
    """Train ``configs`` as one stack, which must give what each gives in a run of its own."""
    together = stacked(configs)
    for i, (config, result) in enumerate(zip(configs, together, strict=True)):
        summary = alone(config, directory / str(i))
        assert result is not None
        assert result.steps == summary["steps"]
        for ours, expected in ((result.val, summary["val"]), (result.test, summary["test"])):
            for metric in ("loss", "bce", "mse", "auc", "active_experts", "dead_experts"):
                assert ours[metric] == pytest.approx(expected[metric], rel=1e-4, abs=2e-5), metric
    return together


def test_an_optimizer_with_its_defaults(configured: Callable[..., SupervisedConfig], tmp_path: Path) -> None:
    """Neither the engine's Adam nor the stack's decays weights unless told to."""
    optimizers = [f"deepspeed.optimizer={{type: Adam, params: {{lr: {lr}}}}}" for lr in (0.02, 0.01)]
    assert_as_alone([configured(optimizer) for optimizer in optimizers], tmp_path)


def test_no_swaps_are_searched_while_a_permutation_is_learnt(
    configured: Callable[..., SupervisedConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage of 27 steps, one that ends with a step that a search is due after, and one without an end."""
    steps_per_epoch = 90
    search = "swap_search={examples: 200, every_epochs: 0.2, least_gain: 0.001}"
    configs = [configured(search, f"model.permutation.epochs={e}") for e in (0.3, 0.4, 10)]
    schedule = configs[0].swap_search
    assert schedule is not None
    assert [step for step in range(1, STEPS + 1) if schedule.due(step, steps_per_epoch)] == [18, 36]
    together = assert_as_alone(configs, tmp_path)
    assert together[0] != together[1] != together[2]
    searched: list[SlotTable] = []

    search_once = SwapScheduleConfig.search

    def spy(self: SwapScheduleConfig, task: Task, model: MoEModel, *arguments: Any) -> SearchReport:
        searched.append(model.tables["moe"])
        return search_once(self, task, model, *arguments)

    monkeypatch.setattr(SwapScheduleConfig, "search", spy)
    assert stacked(configs) == together
    assert len(searched) == 2


@pytest.mark.parametrize("permutation", ["null", "{epochs: 0.3}", "{epochs: 0.3, rounding: relaxed}"])
def test_a_trial_that_leaves_does_not_disturb_the_others(
    configured: Callable[..., SupervisedConfig], permutation: str
) -> None:
    """One diverges at once, one is given up after the first validation, one stays."""
    configs = [configured(f"{LR}={lr}", f"model.permutation={permutation}") for lr in (1e30, 0.005, 0.01)]
    seen: list[tuple[int, int]] = []

    def report(trial: int, step: int, loss: float) -> bool:
        seen.append((trial, step))
        return trial == 1

    diverged, given_up, stayed = stacked(configs, report)
    assert diverged is not None
    assert not torch.isfinite(torch.tensor(diverged.val["loss"]))
    assert diverged.steps == VALIDATE_EVERY
    assert given_up is None
    assert seen == [(0, 15), (1, 15), (2, 15), (2, 30), (2, 45)]
    (on_its_own,) = stacked([configs[2]])
    assert stayed is not None
    assert on_its_own is not None
    for metric, value in on_its_own.test.items():
        assert stayed.test[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric


def test_patience_gives_each_trial_its_own_end(configured: Callable[..., SupervisedConfig]) -> None:
    configs = [configured(f"{LR}={lr}", "train.max_steps=300", "train.epochs=1000") for lr in (0.1, 0.002)]
    fast, slow = stacked(configs)
    assert fast is not None
    assert slow is not None
    assert fast.steps < slow.steps


def test_what_may_differ_within_a_stack(configured: Callable[..., SupervisedConfig]) -> None:
    base = configured()
    for override in (f"{LR}=0.1", "model.gate.gamma=3", "model.gate.entropy_weight=2"):
        assert stack_key(configured(override)) == stack_key(base), override
    for override in (
        "model.gate.k=3",
        "seed=1",
        "train.batch_size=32",
        "model.permutation.epochs=1",
        "model.experts.dropout=0.1",
    ):
        assert stack_key(configured(override)) != stack_key(base), override
    outside = [configured("model.gate.name=nearest_test_gate", *more) for more in GATES["nearest_test_gate"]]
    assert stack_key(outside[0]) == stack_key(outside[1])
    assert [stack_error(config) for config in outside] == [None, None]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.gate.name=smoe_dropout", "model.gate.name=smoe_dropout"),
        ("model.gate={name: top_k, bias_update_rate: 0.01}", "bias_update_rate"),
        ("deepspeed.optimizer.type=Lamb", "optimizer.type"),
        ("deepspeed.gradient_clipping=1.0", "gradient_clipping"),
        ("model.permutation={forward: hard}", "forward=hard"),
        ("model.experts={name: mlp, batch_norm: true}", "batch_norm=true"),
        ("assignment_search={while_entropy: [0.9, 0.5]}", "while_entropy=[0.9, 0.5]"),
    ],
)
def test_what_cannot_be_stacked_is_said(
    configured: Callable[..., SupervisedConfig], override: str, reason: str
) -> None:
    config = configured(override)
    error = stack_error(config)
    assert error is not None
    assert reason in error
    with pytest.raises(UserError, match="set trials_together: 1"):
        run_trials([config, config], never)
    assert stack_error(configured()) is None


def test_a_trial_that_diverges_alone_is_no_failure(configured: Callable[..., SupervisedConfig]) -> None:
    """As in a stack, whose trials have no finite loss then: it counts as the worst, and is not tried again."""
    config = configured(f"{LR}=1e30", "train.max_skipped_steps=2")
    (alone,), together = run_trials([config], never), run_trials([config, config], never)
    for result in (alone, *together):
        assert result is not None
        assert not math.isfinite(result.val["loss"])
    assert alone is not None
    assert 0 < alone.steps <= STEPS


def test_trials_of_different_shapes_go_to_different_stacks(configured: Callable[..., SupervisedConfig]) -> None:
    configs = [configured(f"model.gate.k={k}", f"{LR}={lr}") for k, lr in ((1, 0.01), (2, 0.01), (1, 0.002))]
    together = run_trials(configs, never)
    for config, result in zip(configs, together, strict=True):
        (expected,) = stacked([config])
        assert result is not None
        assert expected is not None
        assert result.test["loss"] == pytest.approx(expected.test["loss"], rel=1e-5)
