"""The times of gate, dispatch, experts and combine: by a clock that only the layer's own parts move."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.parallel import PHASES, FlatExchange, PhaseClock, SingleWorld, World, timed
from dist_moe.parallel import phase_clock as module
from dist_moe.routing import Route
from tests.helpers.worlds import both_kinds
from tests.layer.cases import Case, build_layer, build_tokens
from tests.parallel.shares import shares_of, step

FORWARD = {"gate": 1.0, "dispatch": 2.0, "experts": 4.0, "combine": 8.0}
BACKWARD = {"gate": 16.0, "dispatch": 32.0, "experts": 64.0, "combine": 128.0}
CPU = torch.device("cpu")


class Now:
    """Seconds, which pass only where something takes them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def take(self, phase: str, x: Tensor) -> Tensor:
        return _Takes.apply(x, self, FORWARD[phase], BACKWARD[phase])


class _Takes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, now: Now, forward: float, backward: float) -> Tensor:
        ctx.now, ctx.backward_seconds = now, backward
        now.seconds += forward
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.now.seconds += ctx.backward_seconds
        return grad, None, None, None


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    now = Now()
    monkeypatch.setattr(module, "time", now)
    return now


class SlowGate(TopK):
    now: Now

    def forward(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Route:
        route = super().forward(x_TD, ids_T)
        return replace(route, weight_N=self.now.take("gate", route.weight_N))


class SlowWorld(SingleWorld):
    """A rank that exchanges with itself: tokens on their way have one width, results another."""

    now: Now

    def all_to_all(self, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Tensor:
        return self.now.take("dispatch" if x_ND.shape[1] == 3 else "combine", x_ND)


def slow_layer(now: Now) -> tuple[MoE, SlowWorld]:
    torch.manual_seed(0)
    layer, world = build_layer(Case(gate="top_k")), SlowWorld()
    gate = SlowGate(3, 8, 2).double()
    gate.now = world.now = now
    layer.experts.register_forward_hook(lambda bank, given, result_NF: now.take("experts", result_NF))
    return MoE(gate, layer.experts, world=world), world


@pytest.mark.parametrize("learning_tokens", [True, False])
def test_every_second_counts_for_its_own_phase(now: Now, learning_tokens: bool) -> None:
    layer, world = slow_layer(now)
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=learning_tokens)
    before = now.take("gate", x_TD * 2)
    world.clock.start(CPU)
    output_TF = layer(before).outputs[0]
    now.seconds += 1000
    output_TF.sum().backward()
    now.seconds += 1000
    expected = {phase: FORWARD[phase] + BACKWARD[phase] for phase in PHASES}
    if not learning_tokens:
        expected["dispatch"] -= BACKWARD["dispatch"]
    assert dict(zip(PHASES, world.clock.stop(), strict=True)) == expected
    assert not world.clock.running


def test_layers_that_share_a_world_add_up(now: Now) -> None:
    layer, world = slow_layer(now)
    world.clock.start(CPU)
    for _ in range(3):
        layer(torch.randn(5, 3, dtype=torch.float64, requires_grad=True)).outputs[0].sum().backward()
        now.seconds += 1000
    assert world.clock.stop() == [3 * (FORWARD[phase] + BACKWARD[phase]) for phase in PHASES]


def test_a_clock_that_is_off_measures_and_changes_nothing() -> None:
    clock, exchange = PhaseClock(), FlatExchange(SingleWorld())
    x_TD = torch.randn(2, 3)
    assert clock.mark("gate", None, x_TD)[0] is x_TD
    assert timed(exchange, clock) is exchange
    assert clock.stop() == [0.0] * 4


@both_kinds
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_the_same_to_the_bit(run: Any, recompute: bool) -> None:
    shares = shares_of(Case(num_gates=2, hardness=0.6, recompute=recompute), [3, 0, 5, 2])

    def of_rank(world: World, is_timed: bool) -> tuple[dict[str, Tensor], list[float]]:
        if is_timed:
            world.clock.start(CPU)
        return step(shares[world.rank], world)[0], world.clock.stop()

    plain, timed = (run(4, lambda world, t=t: of_rank(world, t)) for t in (False, True))
    for (expected, nothing), (actual, seconds) in zip(plain, timed, strict=True):
        assert all(torch.equal(actual[name], x) for name, x in expected.items())
        assert nothing == [0.0] * 4
        assert all(of_phase > 0 for of_phase in seconds)


def test_phases_fill_the_real_time_of_a_layer() -> None:
    layer = build_layer(Case(gate="top_k", tokens=64))
    moe = layer.moe()
    x_TD = build_tokens(Case(tokens=64))
    for is_timed in (False, True):
        started = time.perf_counter()
        if is_timed:
            moe.world.clock.start(CPU)
        moe(x_TD).outputs[0].sum().backward()
        seconds, total = moe.world.clock.stop(), time.perf_counter() - started
    assert 0.3 * total < sum(seconds) <= total
