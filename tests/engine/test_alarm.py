"""Alarms of routing: planted faults are found within 50 steps, healthy runs stay silent."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_moe.engine.callbacks import Callback
from dist_moe.engine.health.alarm import REMEDIES, RouterAlarm
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.tensorboard import TensorBoardSettings
from dist_moe.engine.settings import TrainConfig
from dist_moe.engine.training import StepLoss, Trainer, fit
from dist_moe.experts import FeedForwardBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.parallel import experts_of_rank
from dist_moe.search import PermutationSearch
from tests.helpers.board import read_board
from tests.helpers.pool import on_ranks

LAYERS, EXPERTS, TOKENS, LOG_EVERY, ONSET, STEPS = 3, 16, 64, 10, 133, 180
Shares = Callable[[int, NDArray[np.float64]], NDArray[np.float64]]


class Screen:
    """What a monitor is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.texts: list[tuple[str, int]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def text(self, name: str, text: str, step: int) -> None:
        assert name == "alarm"
        self.texts.append((text, step))


def synthetic(
    seed: int, shares_of: Shares, per_token: int = 2, spread: float = 0.5, tokens: int = TOKENS
) -> list[tuple[str, int]]:
    """Alarms of a run whose layers have popularities that drift, changed by ``shares_of`` (step, (L, E) shares).

    ``spread``: standard deviation of the logarithms of the first popularities.
    """
    rng, screen = np.random.default_rng(seed), Screen()
    layers = [SimpleNamespace(experts=SimpleNamespace(num_experts=EXPERTS)) for _ in range(LAYERS)]
    trainer: Any = SimpleNamespace(layers=layers, tables={}, monitor=screen)
    alarm = RouterAlarm()
    alarm.on_start(trainer)
    logit_LE = spread * rng.normal(size=(LAYERS, EXPERTS))
    records: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        logit_LE += 0.03 * rng.normal(size=logit_LE.shape)
        share_LE = shares_of(step, np.exp(logit_LE) / np.exp(logit_LE).sum(axis=1, keepdims=True))
        rows_L = [per_token * tokens * bool(share_E.any()) for share_E in share_LE]
        load_LE = [rng.multinomial(rows, share_E).tolist() for rows, share_E in zip(rows_L, share_LE, strict=True)]
        records.append({"step": step, "load": load_LE, "tokens": float(tokens)})
        if step % LOG_EVERY == 0:
            alarm.on_records(trainer, records)
            records = []
    assert [line for line, _ in screen.texts] == screen.lines
    return screen.texts


def collapse(step: int, share_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nearly all tokens of layer 1 go to the same two experts from ONSET on."""
    if step >= ONSET:
        share_LE[1] = [0.49, 0.49, *[0.02 / (EXPERTS - 2)] * (EXPERTS - 2)]
    return share_LE


def rotation(step: int, share_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nearly all tokens of a step go to the same two experts of layer 1 from ONSET on, in each step to another two."""
    if step >= ONSET:
        share_LE[1] = 0.02 / (EXPERTS - 2)
        share_LE[1, [2 * step % EXPERTS, 2 * step % EXPERTS + 1]] = 0.49
    return share_LE


def death(step: int, share_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    return share_LE * np.array([1, 1, step < ONSET])[:, None]


def imbalance(step: int, share_LE: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nearly all tokens of layer 0 go to four of its experts from ONSET on, as suddenly as a loss spike does."""
    if step >= ONSET:
        share_LE[0] = [0.24] * 4 + [0.04 / (EXPERTS - 4)] * (EXPERTS - 4)
    return share_LE


FAULTS = [
    *((collapse, "collapse", 1, seed) for seed in range(20)),
    *((rotation, "collapse within steps", 1, seed) for seed in range(5)),
    *((death, "dead layer", 2, seed) for seed in range(2)),
    *((imbalance, "loss of balance", 0, seed) for seed in range(5)),
]


@pytest.mark.parametrize(("fault", "kind", "layer", "seed"), FAULTS)
def test_planted_faults_are_found_within_50_steps_and_said_once(
    fault: Shares, kind: str, layer: int, seed: int
) -> None:
    ((sentence, step),) = synthetic(seed, fault)
    assert ONSET <= step <= ONSET + 50 - LOG_EVERY
    assert f"{kind}: MoE layer {layer} has" in sentence
    assert REMEDIES[kind] in sentence


@pytest.mark.parametrize("seed", range(20))
def test_healthy_loads_raise_no_alarm(seed: int) -> None:
    assert synthetic(seed, lambda _, share_LE: share_LE, spread=0.4 + 0.4 * (seed % 2)) == []


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_a_few_rows_in_a_step_are_no_collapse(tokens: int) -> None:
    """However even the gate is, two tokens cannot have sixteen experts."""
    assert synthetic(0, lambda _, share_LE: np.full_like(share_LE, 1 / EXPERTS), per_token=1, tokens=tokens) == []


def test_trees_that_harden_raise_no_alarm_and_many_layers_one_line() -> None:
    """All experts for every token is even by nature, whatever its load says; a fault of all layers is one sentence."""
    assert synthetic(0, lambda _, share_LE: np.full_like(share_LE, 1 / EXPERTS), per_token=EXPERTS) == []
    ((sentence, _),) = synthetic(0, lambda step, share_LE: share_LE * (step < ONSET))
    assert "(and 2 more)" in sentence


def test_an_alarm_is_not_repeated_after_a_restart() -> None:
    alarm, screen = RouterAlarm(), Screen()
    layers = [SimpleNamespace(experts=SimpleNamespace(num_experts=2))]
    trainer: Any = SimpleNamespace(layers=layers, tables={}, monitor=screen)
    alarm.on_start(trainer)
    records = [{"step": step, "load": [[8, 0]], "tokens": 8.0} for step in range(1, 41)]
    alarm.on_records(trainer, records)
    again = RouterAlarm()
    again.load_state_dict(alarm.state_dict())
    again.on_start(trainer)
    again.on_records(trainer, records)
    assert len(screen.lines) == 1
    trainer.layers = layers * 2
    again.on_start(trainer)
    assert "alarms begin anew" in screen.lines[-1]
    assert "not of a model with 2 layers" in screen.lines[-1]


@pytest.mark.parametrize("moved", [False, True])
def test_a_search_that_moves_nothing(moved: bool) -> None:
    search, alarm, screen = PermutationSearch(4, stage_steps=2), RouterAlarm(), Screen()
    trainer: Any = SimpleNamespace(layers=[], tables={"moe": search}, monitor=screen)
    alarm.on_start(trainer)
    for step in (1, 2):
        search.begin_step()
        if moved and step == 1:
            search.relaxed.data = search.relaxed[..., [1, 0, 2, 3]]
        alarm.on_records(trainer, [{"step": step}])
    assert [("search without effect" in line, step) for line, step in screen.texts] == [(True, 2)] * (not moved)


class Net(nn.Module):
    """Top-1 of eight experts by a balanced gate, and a dense head."""

    def __init__(self, groups: ProcessGroups) -> None:
        super().__init__()
        bank = FeedForwardBank(8, 8, 8, experts_of_rank(8, groups.world))
        self.moe = MoE(TopK(8, 8, k=1, balance_weight=0.05), bank, world=groups.world)
        self.head = nn.Linear(8, 1)


class Rows:
    """Gaussian rows, drawn anew in every step."""

    steps_per_epoch = 1000

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def micro_batches(self, step: int) -> list[Tensor]:
        return [torch.randn(64, 8, generator=torch.Generator().manual_seed(1_000_000 * self._seed + step))]


def objective(engine: Any, x_TD: Tensor) -> StepLoss:
    output = engine.module.moe(x_TD)
    loss = (engine.module.head(output.outputs[0])[:, 0] - x_TD[:, :2].prod(dim=1)).square().mean()
    total = torch.stack([loss, *output.aux.values()]).sum()
    load_LE = output.pairs.rows_per_expert_E[None]
    return StepLoss(total, {"loss": loss.detach(), "tokens": float(len(x_TD)), "load": load_LE})


class Plant(Callback):
    """Draws all tokens to one expert from a step on."""

    def __init__(self, onset: int) -> None:
        self._onset = onset

    def before_step(self, trainer: Trainer, step: int) -> None:
        if step >= self._onset:
            with torch.no_grad():
                trainer.model.moe.gates[0].bias[3] = 50.0


def real_run(seed: int, onset: int, root: Path) -> str:
    """What rank 0 prints in a run of 150 steps."""
    screen, environment = io.StringIO(), LaunchEnvironment.read()
    with redirect_stderr(screen), process_groups(environment, ParallelConfig()) as groups:
        torch.manual_seed(seed)
        fit(
            Net(groups),
            Rows(seed),
            objective,
            TrainConfig(max_steps=150, batch_size=64, log_every=LOG_EVERY),
            deepspeed={"optimizer": {"type": "SGD", "params": {"lr": 0.05}}, "zero_optimization": {"stage": 0}},
            seed=seed,
            callbacks=[Plant(onset)],
            trackers=[TensorBoardSettings()],
            run=RunDirectory(root),
            groups=groups,
        )
    return screen.getvalue()


def alarms_of(root: Path) -> list[tuple[int, str]]:
    board = read_board(root)
    if "alarm/text_summary" not in board.Tags()["tensors"]:
        return []
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in board.Tensors("alarm/text_summary")]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_a_real_run_that_collapses(tmp_path: Path, seed: int) -> None:
    onset = 61
    (printed,) = on_ranks(1, real_run, seed, onset, tmp_path)
    ((step, sentence),) = alarms_of(tmp_path)
    assert onset <= step <= onset + 50
    assert "collapse: MoE layer 0 has 1." in sentence
    assert printed.count("ALARM") == 1
    assert sentence in printed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_real_run_that_is_healthy(tmp_path: Path, seed: int) -> None:
    (printed,) = on_ranks(1, real_run, seed, 10**6, tmp_path)
    assert alarms_of(tmp_path) == []
    assert "ALARM" not in printed
