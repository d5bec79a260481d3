"""Every exchange on the path for accelerators, without one: its experts take counts that the host has not seen, its
results are those of the CPU's path, and no sum depends on the order in which numbers come."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dist_moe.experts import BertFeedForwardBank, DenseReLUBank, ExpertBank, FeedForwardBank
from dist_moe.gates import Comet, TopK
from dist_moe.kernels import sums_at
from dist_moe.layer import MoE
from dist_moe.parallel import EmulatedWorld, ExchangeOptions, World, experts_of_rank
from tests.helpers.device_path import device_path_forced
from tests.helpers.host import NoAtomicSums
from tests.helpers.oracle import assert_all_same, gradients
from tests.layer.cases import Case
from tests.parallel.shares import shares_of, step

RANKS, EXPERTS, WIDTH, HIDDEN = 4, 16, 6, 5
TOKENS = [3, 0, 5, 2]
LAYERS = {
    "comet": Case(num_gates=2, hardness=0.6, num_experts=EXPERTS),
    "top-k": Case(gate="top_k", k=5, num_experts=EXPERTS),
    "dselect-k": Case(gate="dselect_k", k=3, num_experts=EXPERTS),
    "merged slots": Case(permutation="map", num_slots=17, num_experts=EXPERTS, per_branch=True),
    "through": Case(permutation="through", num_experts=EXPERTS),
}


@dataclass(frozen=True)
class Way:
    """How rows are exchanged. ``shared``: beside a shared expert."""

    chunks: int = 1
    per_node: int | None = None
    shared: bool = False

    def world(self) -> EmulatedWorld:
        return EmulatedWorld(RANKS, ranks_per_node=self.per_node, options=ExchangeOptions(overlap_chunks=self.chunks))


WAYS = {
    "flat": Way(),
    "chunks": Way(chunks=3),
    "shared": Way(shared=True),
    "nodes": Way(per_node=2),
    "nodes of one": Way(per_node=1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_give_the_same_without_a_sum_by_atomics(layer: str, way: str) -> None:
    found = []
    for on_path in (False, True):
        parts = shares_of(LAYERS[layer], TOKENS)

        def of_rank(world: World, parts: Any = parts, on_path: bool = on_path) -> dict[str, Tensor]:
            with NoAtomicSums() if on_path else nullcontext():
                return step(parts[world.rank], world)[0]

        with device_path_forced() if on_path else nullcontext():
            found.append(WAYS[way].world().run(of_rank))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_all_same(actual, expected, 1e-11)


def make_bank(kind: str, world: World) -> ExpertBank:
    ids = experts_of_rank(EXPERTS, world)
    torch.manual_seed(world.rank)
    if kind == "bert":
        return BertFeedForwardBank(WIDTH, HIDDEN, EXPERTS, ids, dropout=0.0).double()
    if kind == "feed_forward":
        return FeedForwardBank(WIDTH, HIDDEN, EXPERTS, ids, activation="silu", gated=True, bias=True).double()
    return DenseReLUBank(WIDTH, WIDTH, EXPERTS, ids).double()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bank", ["feed_forward", "dense_relu", "bert"])
@pytest.mark.parametrize("gate", ["comet", "top_k"])
def test_experts_never_see_counts_on_the_host(gate: str, bank: str, way: str) -> None:
    found = [_step_of_ranks(gate, bank, WAYS[way], on_path) for on_path in (False, True)]
    for (actual, kinds), (expected, kinds_on_cpu) in zip(found[1], found[0], strict=True):
        assert_all_same(actual, expected, 1e-11)
        assert kinds == {Tensor}
        assert kinds_on_cpu == {list}


def _step_of_ranks(gate: str, kind: str, way: Way, on_path: bool) -> list[tuple[dict[str, Tensor], set[type]]]:
    def of_rank(world: World) -> tuple[dict[str, Tensor], set[type]]:
        torch.manual_seed(9)
        one = Comet(WIDTH, EXPERTS, k=2) if gate == "comet" else TopK(WIDTH, EXPERTS, k=3)
        shared = nn.Linear(WIDTH, WIDTH).double() if way.shared else None
        bank, kinds = make_bank(kind, world), set[type]()
        forward = bank.forward

        def seen(x_ND: Tensor, rows_per_expert: Any) -> Tensor:
            kinds.add(type(rows_per_expert))
            return forward(x_ND, rows_per_expert)

        moe = MoE(one.double(), bank, world=world, shared=shared)
        x_TD = torch.randn(TOKENS[world.rank], WIDTH, dtype=torch.float64).requires_grad_()
        with mock.patch.object(bank, "forward", seen), NoAtomicSums() if on_path else nullcontext():
            loss = moe(x_TD).outputs[0].square().sum()
            return gradients(loss, dict(moe.named_parameters()) | {"x": x_TD}) | {"loss": loss.detach()}, kinds

    with device_path_forced() if on_path else nullcontext():
        return way.world().run(of_rank)


@pytest.mark.parametrize("width", [(), (3,), (2, 3)])
@pytest.mark.parametrize("rows", [0, 1, 40])
def test_sums_at_places_are_those_of_a_loop(rows: int, width: tuple[int, ...]) -> None:
    torch.manual_seed(rows)
    rows_N = torch.randn(rows, *width, dtype=torch.float64, requires_grad=True)
    place_N, cotangent = torch.randint(7, (rows,)), torch.randn(9, *width, dtype=torch.float64)
    expected = torch.zeros(9, *width, dtype=torch.float64)
    for row, place in zip(rows_N.detach(), place_N.tolist(), strict=True):
        expected[place] += row
    for on_path in (False, True):
        with device_path_forced() if on_path else nullcontext():
            actual = sums_at(rows_N, place_N, 9)
            (grad_N,) = torch.autograd.grad(actual, rows_N, cotangent)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(grad_N, cotangent[place_N])
