"""Every gate equals its naive fp64 version: values, auxiliary losses and all gradients."""

from __future__ import annotations

import pytest
import torch

from tests.gates.cases import (
    HALF,
    SATURATED,
    UNSATURATED,
    VARIANTS,
    build,
    check_against_naive,
    ids,
    rows_sum_to_one,
    tokens,
)
from tests.helpers.oracle import assert_all_same, assert_same

PLAIN = ("comet", "top_k", "dselect_k", "hash", "softmax", "smoe_dropout", "relu", "ada_moe")
HARDNESSES = (UNSATURATED, HALF, SATURATED)


@pytest.mark.parametrize("variant", PLAIN)
@pytest.mark.parametrize("n", [*range(2, 34), 64, 100])
def test_every_number_of_experts(variant: str, n: int) -> None:
    k = min(n, (1, 2, 3, 5)[n % 4])
    check_against_naive(build(variant, n, k, HARDNESSES[n % 3], seed=n), tokens(2 if n < 17 else 1, seed=n))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("n", "k", "hardness"), [(2, 2, HALF), (5, 3, HALF), (8, 2, UNSATURATED), (8, 2, SATURATED), (13, 4, SATURATED)]
)
def test_every_variant(variant: str, n: int, k: int, hardness: float) -> None:
    check_against_naive(build(variant, n, k, hardness, seed=n), tokens(3, seed=n))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("count", [0, 1])
def test_no_token_and_one_token(variant: str, count: int) -> None:
    check_against_naive(build(variant, 6, 2), tokens(count))


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_parameters_zero_so_that_everything_ties(variant: str) -> None:
    gate = build(variant, 7, 3)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
    check_against_naive(gate, tokens(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_of_zeros_and_equal_experts(variant: str) -> None:
    gate = build(variant, 6, 3)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter[..., 1::2] = parameter[..., 0::2][..., : parameter[..., 1::2].shape[-1]]
    check_against_naive(gate, tokens(3).detach().mul(torch.tensor([[0.0], [1.0], [2.0]])).requires_grad_())


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("relu")])  # logits are unbounded
@pytest.mark.parametrize("n", [4, 7])
@pytest.mark.parametrize("hardness", [HALF, SATURATED])
def test_rows_lie_in_the_simplex(variant: str, n: int, hardness: float) -> None:
    gate = build(variant, n, 2, hardness)
    sums_T = gate(tokens(9), ids(9)).dense().sum(dim=1)
    assert bool((sums_T <= 1 + 1e-12).all())
    if rows_sum_to_one(gate):
        assert_same(sums_T, torch.ones(9, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("variant", ["comet", "comet_lazy", "comet_static", "dselect_k", "dselect_k_static"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("n", [5, 8, 16, 33])
def test_at_most_k_experts_when_everything_is_saturated(variant: str, n: int, k: int) -> None:
    route = build(variant, n, k, hardness=1e6)(tokens(40), None)
    assert torch.bincount(route.token_N, minlength=40).max() <= k


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixture_sums_to_the_route(variant: str) -> None:
    gate, x_TD = build(variant, 6, 2), tokens(5).detach()
    torch.manual_seed(4)
    mixture = gate.mixture(x_TD, ids(5))
    torch.manual_seed(4)
    route = gate(x_TD, ids(5))
    assert mixture.weight_TKE.shape == (5, gate.num_branches, 6)
    slots_TS = mixture.weight_TKE.flatten(1) if gate.splits_branches else mixture.weight_TKE.sum(1)
    assert_same(route.dense(), slots_TS, 1e-14)
    assert_all_same(route.aux, mixture.aux, 1e-14)
