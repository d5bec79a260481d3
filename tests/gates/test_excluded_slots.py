"""Slots that a gate may not choose: exact zeros, the sums and gradients of the naive gate, in every variant."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dist_moe.gates import Comet, DSelectK, Gate, HashRouting, NullSlots, Softmax, TopK
from dist_moe.gates.base import Mixture
from dist_moe.gates.tree import one_sided_splits
from dist_moe.routing import Route
from tests.gates.cases import (
    DIM,
    HALF,
    SATURATED,
    UNSATURATED,
    VARIANTS,
    build,
    check_against_naive,
    ids,
    loss_of,
    rows_sum_to_one,
    tokens,
)
from tests.helpers.oracle import assert_same, naive_gradients, naive_open_leaves


def booleans(n: int, left: Sequence[int]) -> Tensor:
    """(n,), true at the places ``left``."""
    return torch.tensor([slot in left for slot in range(n)])


def restricted(variant: str, n: int, k: int, hardness: float, left: Sequence[int]) -> Gate:
    gate = build(variant, n, k, hardness, seed=n)
    gate.allow(booleans(n, left))
    return gate


def check(gate: Gate, x_TD: Tensor) -> Route:
    route = check_against_naive(gate, x_TD)
    assert gate.allowed_E is not None
    assert bool(gate.allowed_E[route.slot_N % gate.num_experts].all())
    return route


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hardness", [UNSATURATED, HALF, SATURATED])
@pytest.mark.parametrize(("n", "left"), [(2, [1]), (5, [0, 3]), (8, [0, 1, 2, 5, 6]), (8, [7]), (13, [2, 3, 11, 12])])
def test_every_variant_equals_the_naive_gate(variant: str, hardness: float, n: int, left: list[int]) -> None:
    """Also where fewer slots are left than a gate would choose, and where hard trees lead to none of them."""
    gate = restricted(variant, n, min(n, 3), hardness, left)
    sums_T = check(gate, tokens(4, seed=n)).dense().sum(1)
    if rows_sum_to_one(gate):
        assert_same(sums_T, torch.ones(4, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens(variant: str) -> None:
    assert check(restricted(variant, 6, 2, HALF, [1, 4]), tokens(0)).num_assignments == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [6, 8])
def test_allowing_every_slot_changes_no_bit(variant: str, n: int) -> None:
    plain, allowed = build(variant, n, 2), build(variant, n, 2)
    assert "allowed_E" not in plain.state_dict()
    allowed.allow(torch.ones(n, dtype=torch.bool))
    x_TD, results = tokens(5), []
    for gate in (plain, allowed):
        torch.manual_seed(3)
        route = gate(x_TD, ids(5))
        results.append([route.dense(), *naive_gradients(loss_of(route.dense(), route.aux), {"x": x_TD}).values()])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "variant", ["comet", "top_k", "hash", "dselect_k", "softmax", "smoe_dropout", "relu", "ada_moe"]
)
def test_the_mask_is_in_the_checkpoint(variant: str) -> None:
    trained, fresh = restricted(variant, 6, 2, HALF, [0, 4]), restricted(variant, 6, 2, HALF, [1, 2, 3])
    fresh.load_state_dict(trained.state_dict())
    x_TD = tokens(7)
    assert torch.equal(fresh(x_TD, ids(7)).dense(), trained(x_TD, ids(7)).dense())
    with pytest.raises(RuntimeError, match="allowed_E"):
        build(variant, 6, 2).load_state_dict(trained.state_dict())


@pytest.mark.parametrize("variant", ["comet", "comet_lazy", "comet_balance"])
@pytest.mark.parametrize("left", [[3], [0, 9, 30], list(range(0, 33, 2))])
def test_hardening_never_loses_a_token(variant: str, left: list[int]) -> None:
    gate = restricted(variant, 33, 3, 1e6, left)
    route = check(gate, tokens(6))
    assert torch.bincount(route.token_N, minlength=6).max() <= 3


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8, 13, 16, 33])
def test_one_sided_splits_equal_naive(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    for share in (0.1, 0.5, 0.9):
        allowed_E = torch.rand(n, generator=generator) < share
        below = naive_open_leaves(n - 1, allowed_E.tolist())
        left_Q, right_Q = one_sided_splits(allowed_E)
        assert left_Q.tolist() == [below[2 * q + 1] > 0 == below[2 * q + 2] for q in range(n - 1)]
        assert right_Q.tolist() == [below[2 * q + 2] > 0 == below[2 * q + 1] for q in range(n - 1)]


def test_ids_of_excluded_slots_are_dealt_out() -> None:
    gate = HashRouting(DIM, 4, torch.ones(40), "balanced")
    before = gate.table.clone()
    gate.allow(booleans(4, [1, 3]))
    stays = (before == 1) | (before == 3)
    assert torch.equal(gate.table[stays], before[stays])
    assert torch.bincount(gate.table, minlength=4).tolist() == [0, 20, 0, 20]


def test_the_selection_bias_balances_the_slots_that_are_left() -> None:
    gate = TopK(DIM, 4, k=1, bias_update_rate=0.1)
    gate.allow(booleans(4, [0, 1, 2]))
    gate.selections += torch.tensor([5, 3, 1, 0])
    gate.end_step()
    assert gate.bias_steps[:3].tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    "allowed_E", [torch.zeros(4, dtype=torch.bool), torch.ones(3, dtype=torch.bool), torch.ones(4)]
)
@pytest.mark.parametrize("kind", [Softmax, TopK, Comet, DSelectK])
def test_a_mask_without_a_slot_or_of_another_kind_is_refused(kind: type[Gate], allowed_E: Tensor) -> None:
    gate = kind(DIM, 4)
    with pytest.raises(ValueError, match="allowed_E must be 4 booleans"):
        gate.allow(allowed_E)
    assert gate.allowed_E is None


class Heedless(Gate):
    """A gate of somebody who has not thought of excluded slots."""

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None) -> Mixture:
        return Mixture(x_TD.new_full((len(x_TD), 1, self.num_experts), 1 / self.num_experts))


def test_a_gate_that_does_not_heed_the_mask_refuses_it() -> None:
    for gate in (Heedless(DIM, 4), NullSlots(Heedless(DIM, 6), 2)):
        with pytest.raises(ValueError, match="cannot exclude slots"):
            gate.allow(torch.ones(4, dtype=torch.bool))
