"""COMET's lazy route against its dense one: the same route and gradients from k log n nodes a token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.gates import Comet
from dist_moe.gates.comet import LAZY_FROM
from dist_moe.routing import Route
from tests.gates.cases import HALF, SATURATED, UNSATURATED, assert_well_formed, loss_of, pair_of_dense_and_lazy, tokens
from tests.helpers.oracle import assert_all_same, assert_same, naive_gradients

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


def route_and_gradients(gate: Comet, x_TD: Tensor) -> tuple[Route, dict[str, Tensor]]:
    route = gate(x_TD)
    return route, naive_gradients(loss_of(route.dense(), route.aux), dict(gate.named_parameters()) | {"x": x_TD})


def assert_lazy_is_dense(dense: Comet, lazy: Comet, x_TD: Tensor, gradient_tolerance: float | None = None) -> None:
    """Indices, weights, losses and every gradient; in fp32, rounding may decide on a leaf of next to no mass."""
    (expected, expected_grads), (actual, actual_grads) = (route_and_gradients(gate, x_TD) for gate in (dense, lazy))
    tolerance = TOLERANCES[x_TD.dtype]
    assert_well_formed(actual, lazy, len(x_TD))
    if x_TD.dtype == torch.float64:
        assert torch.equal(actual.token_N, expected.token_N)
        assert torch.equal(actual.slot_N, expected.slot_N)
    assert_same(actual.dense(), expected.dense(), tolerance)
    assert_all_same(actual.aux, expected.aux, tolerance)
    assert_all_same(actual_grads, expected_grads, gradient_tolerance or tolerance)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("hardness", [UNSATURATED, HALF, 3.0, SATURATED])
@pytest.mark.parametrize("n", [*range(2, 34), 64, 100, 1024])
def test_lazy_is_dense_in_double_precision(n: int, hardness: float, num_tokens: int) -> None:
    assert_lazy_is_dense(*pair_of_dense_and_lazy(n, 2, hardness), tokens(num_tokens))


@pytest.mark.parametrize("hardness", [UNSATURATED, 3.0, SATURATED])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (33, 3), (100, 2), (1024, 2)])
def test_lazy_is_dense_in_single_precision(n: int, k: int, hardness: float) -> None:
    dense, lazy = (gate.float() for gate in pair_of_dense_and_lazy(n, k, hardness))
    assert_lazy_is_dense(dense, lazy, tokens(20).detach().float().requires_grad_())


@pytest.mark.parametrize("options", [{"max_active": 3}, {"split_slots": True}, {"balance_weight": 0.2}])
@pytest.mark.parametrize("hardness", [UNSATURATED, HALF, 2.0, SATURATED])
@pytest.mark.parametrize(("n", "k"), [(2, 1), (5, 2), (8, 3), (13, 2), (33, 2), (100, 2)])
def test_lazy_is_dense_with_every_option(n: int, k: int, hardness: float, options: dict[str, Any]) -> None:
    tolerance = 1e-10 if n == 100 or "balance_weight" in options else None
    assert_lazy_is_dense(*pair_of_dense_and_lazy(n, k, hardness, **options), tokens(7), tolerance)


@pytest.mark.parametrize("edge", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("n", [7, 64])
def test_ties_and_products_at_the_edge_of_saturation(n: int, edge: float) -> None:
    """Every split exactly at -gamma/2, 0 or gamma/2, and all leaves alike."""
    dense, lazy = pair_of_dense_and_lazy(n, 2, HALF)
    for gate in (dense, lazy):
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.zero_()
            gate.split_bias.fill_(edge * gate.gamma / 2)
    assert_lazy_is_dense(dense, lazy, tokens(3))
    assert lazy(tokens(3)).num_assignments == 3 * (n if edge == 0 else 1)


def nodes_visited(n: int, k: int, num_tokens: int) -> tuple[float, float]:
    """Splits and leaves per token of trees that are hard but for a few splits."""
    torch.manual_seed(0)
    gate = Comet(8, n, k, gamma=1.0, lazy=True)
    with torch.no_grad():
        gate.split_weight.normal_(std=30)
    visit = gate._visit(torch.randn(num_tokens, 8))
    assert visit is not None
    return len(visit.splits) / num_tokens, len(visit.leaves) / num_tokens


@pytest.mark.parametrize("k", [1, 2, 4])
def test_visited_nodes_grow_as_k_log_n(k: int) -> None:
    for n in (64, 1024, 16384):
        splits, leaves = nodes_visited(n, k, 50)
        assert k * math.log2(n) <= splits < 1.3 * k * math.log2(n), n
        assert k <= leaves < 1.4 * k, n


def test_lazy_is_chosen_for_large_trees_once_they_are_hard() -> None:
    """By itself (null): below some size, and while much is reachable, the dense mixture is computed."""
    for n, hardness, dense_calls in ((LAZY_FROM, SATURATED, 0), (LAZY_FROM, UNSATURATED, 1), (64, SATURATED, 1)):
        dense, gate = pair_of_dense_and_lazy(n, 2, hardness)
        gate.lazy, calls = None, []
        mixture = gate.mixture
        gate.mixture = lambda *arguments, mixture=mixture, calls=calls: calls.append(1) or mixture(*arguments)
        route, expected = gate(tokens(6)), dense(tokens(6))
        assert len(calls) == dense_calls, (n, hardness)
        assert torch.equal(route.slot_N, expected.slot_N)
        assert_same(route.weight_N, expected.weight_N, 1e-12)


def test_static_trees_are_never_visited_lazily_by_themselves() -> None:
    gate = Comet(3, LAZY_FROM, 2, static=True)
    assert gate(torch.zeros(2, 3)).num_tokens == 2


def test_splits_without_gradient_get_zeros_and_not_none() -> None:
    _, gate = pair_of_dense_and_lazy(64, 2, SATURATED)
    gate(tokens(4)).weight_N.square().sum().backward()
    for parameter in (gate.split_weight, gate.split_bias):
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        assert not parameter.grad.any()
    assert gate.leaf_weight.grad is not None
    assert int(gate.leaf_weight.grad.flatten(0, 1).any(1).sum()) <= 4 * gate.k
