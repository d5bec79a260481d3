"""A shared expert: added to every gate's output, on one rank and several, while rows travel, and under a replay."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.layer import MoE
from dist_moe.parallel import EmulatedWorld, OncePerPart, OverlappedExchange, ProcessWorld, World
from dist_moe.search import SlotTable
from dist_moe.search.replay import Recorder
from tests.helpers.oracle import assert_all_same, assert_same, gradients
from tests.helpers.worlds import both_kinds, run_worlds
from tests.layer.cases import Case, Layer, build_layer, build_tokens

CASE = Case(num_gates=2, num_experts=8, tokens=7)


def make_shared(case: Case = CASE) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(case.dim, 5), nn.Tanh(), nn.Linear(5, case.hidden)).double()


def layer_of(layer: Layer, world: World | None, shared: nn.Module | None, **options: Any) -> MoE:
    return MoE(layer.gates, layer.experts, layer.search, world, shared=shared, **options)


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([(weight + 1) * y.square().sum() for weight, y in enumerate(outputs)]).sum()


def leaves_of(layer: Layer, shared: nn.Module, x_TD: Tensor) -> dict[str, Tensor]:
    return layer.leaves() | {f"shared.{name}": p for name, p in shared.named_parameters()} | {"x": x_TD}


def test_its_result_is_added_to_that_of_every_gate() -> None:
    layer, shared, x_TD = build_layer(CASE), make_shared(), build_tokens(CASE)
    plain = layer_of(layer, None, None)(x_TD).outputs
    expected = tuple(y + shared(x_TD) for y in plain)
    actual = layer_of(layer, None, shared)(x_TD).outputs
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, theirs, 1e-14)
    leaves = leaves_of(layer, shared, x_TD)
    assert_all_same(gradients(loss_of(actual), leaves), gradients(loss_of(expected), leaves), 1e-13)


@both_kinds
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tokens_per_rank", [[3, 4], [0, 7]])
def test_ranks_equal_one_rank(run: Any, tokens_per_rank: list[int], recompute: bool) -> None:
    layer, shared, x_TD = build_layer(CASE), make_shared(), build_tokens(CASE)
    outputs = layer_of(layer, None, shared)(x_TD).outputs
    leaves = leaves_of(layer, shared, x_TD)
    expected = gradients(loss_of(outputs), leaves)

    def of_rank(world: World) -> tuple[Tensor, dict[str, Tensor]]:
        share, own = layer.of_rank(world.rank, world.size), copy.deepcopy(shared)
        mine_TD = x_TD.detach().split(tokens_per_rank)[world.rank].requires_grad_()
        mine = layer_of(share, world, own, recompute_experts=recompute)(mine_TD).outputs
        return torch.stack(mine).detach(), gradients(loss_of(mine), leaves_of(share, own, mine_TD))

    results = run(2, of_rank)
    assert_same(torch.cat([outputs for outputs, _ in results], dim=1), torch.stack(outputs).detach(), 1e-12)
    summed = {name: sum(grads[name] for _, grads in results) for name in expected if name.startswith("shared")}
    assert_all_same(summed, {name: expected[name] for name in summed}, 1e-12)
    assert_same(torch.cat([grads["x"] for _, grads in results]), expected["x"], 1e-12)


def test_it_is_computed_while_rows_travel_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    local = threading.local()
    begin = ProcessWorld.begin_exchange

    def logged(world: ProcessWorld, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Any:
        pending = begin(world, x_ND, send_rows, receive_rows)
        wait = pending.wait
        pending.wait = lambda: (local.log.append("end"), wait())[1]
        local.log.append("begin")
        return pending

    monkeypatch.setattr(ProcessWorld, "begin_exchange", logged)
    layer, x_TD = build_layer(CASE), build_tokens(CASE)

    def of_rank(world: World) -> list[str]:
        local.log = []
        shared = make_shared()
        shared.register_forward_hook(lambda *_: local.log.append("shared"))
        shared.register_full_backward_hook(lambda *_: local.log.append("shared back"))
        moe = layer_of(layer.of_rank(world.rank, world.size), world, shared)
        assert isinstance(moe.exchange, OverlappedExchange)
        loss_of(moe(x_TD.detach().requires_grad_()).outputs).backward()
        return local.log

    expected = ["begin", "shared", "end", "begin", "end", "begin", "end", "begin", "shared back", "end"]
    assert run_worlds(2, of_rank) == [expected, expected]


def test_two_levels_have_it_too() -> None:
    layer, shared, x_TD = build_layer(CASE), make_shared(), build_tokens(CASE).detach()
    expected = torch.stack(layer_of(layer, None, shared)(x_TD).outputs)

    def of_rank(world: World) -> Tensor:
        moe = layer_of(layer.of_rank(world.rank, world.size), world, shared)
        assert isinstance(moe.exchange, OncePerPart)
        return torch.stack(moe(x_TD).outputs)

    for outputs in EmulatedWorld(4, ranks_per_node=2).run(of_rank):
        assert_same(outputs.detach(), expected.detach(), 1e-12)


def test_a_replay_gets_it_too() -> None:
    """A search records the experts' results and mixes them anew; the shared expert is no part of what it changes."""
    layer, shared, x_TD = build_layer(CASE), make_shared(), build_tokens(CASE)
    moe = MoE(layer.gates, layer.experts, SlotTable(CASE.num_experts, CASE.num_gates), shared=shared)
    expected = torch.stack(moe(x_TD).outputs)
    with moe.replayed_by(Recorder()):
        assert_same(torch.stack(moe(x_TD).outputs), expected, 1e-13)
