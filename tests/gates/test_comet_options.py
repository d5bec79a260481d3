"""COMET's options: lazy descent, a cap on active leaves, hard evaluation, static trees, split balance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.gates import Comet, CometConfig, GateContext
from dist_moe.gates.comet import split_balance
from tests.gates.cases import (
    SATURATED,
    UNSATURATED,
    build,
    leaf_mass,
    loss_of,
    pair_of_dense_and_lazy,
    split_and_leaf_masses,
    tokens,
)
from tests.helpers.oracle import assert_same, naive_gradients


def reached_nodes(gate: Comet, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """(k, n-1) and (k, n) bool: does any token reach the split, the leaf?"""
    split_TKQ, leaf_TKE = split_and_leaf_masses(gate, x_TD)
    return (split_TKQ > 0).any(dim=0), (leaf_TKE > 0).any(dim=0)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("hardness", [2.0, SATURATED])
def test_gradients_of_nodes_that_no_token_reaches_are_exactly_zero(lazy: bool, hardness: float) -> None:
    gate, x_TD = pair_of_dense_and_lazy(33, 2, hardness)[lazy], tokens(3)
    split_KQ, leaf_KE = reached_nodes(gate, x_TD)
    assert not split_KQ.all()
    route = gate(x_TD)
    grads = naive_gradients(loss_of(route.dense(), route.aux), dict(gate.named_parameters()))
    for name, reached in (("split", split_KQ), ("leaf", leaf_KE)):
        for kind in ("weight", "bias"):
            grad = grads[f"{name}_{kind}"]
            assert not grad[~reached].any()
            assert grad[reached].any() or (name == "split" and hardness == SATURATED)


@pytest.mark.parametrize("lazy", [False, True])
def test_weights_that_underflow_are_no_assignments(lazy: bool) -> None:
    gate = Comet(2, 4, 2, lazy=lazy)
    with torch.no_grad():
        gate.leaf_bias[:, 0] = 1000.0
    route = gate(torch.zeros(3, 2))
    assert route.slot_N.tolist() == [0, 0, 0]
    assert route.weight_N.tolist() == [1, 1, 1]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3, 50])
def test_max_active_keeps_the_heaviest_in_their_proportions(most: int, lazy: bool) -> None:
    dense, _ = pair_of_dense_and_lazy(8, 2, UNSATURATED)
    capped = pair_of_dense_and_lazy(8, 2, UNSATURATED, max_active=most)[lazy]
    x_TD = tokens(6)
    all_TE, kept_TE = dense(x_TD).dense(), capped(x_TD).dense()
    assert (kept_TE > 0).sum(dim=1).tolist() == [min(most, 8)] * 6
    assert_same(kept_TE.sum(dim=1), torch.ones(6).double(), 1e-12)
    for all_E, kept_E in zip(all_TE, kept_TE, strict=True):
        kept = kept_E > 0
        assert most >= 8 or all_E[kept].min() > all_E[~kept].max()
        assert_same(kept_E[kept] / kept_E.max(), all_E[kept] / all_E.max(), 1e-12)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(("split_slots", "slots"), [(False, [0, 1]), (True, [0, 1])])
def test_max_active_prefers_the_lower_slot_among_equals(lazy: bool, split_slots: bool, slots: list[int]) -> None:
    gate = Comet(2, 8, 2, max_active=2, lazy=lazy).double()
    gate.splits_branches = split_slots
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
    route = gate(torch.ones(3, 2).double())
    assert route.slot_N.tolist() == slots * 3
    assert route.weight_N.tolist() == [0.5] * 6


@pytest.mark.parametrize("lazy", [False, True])
def test_hard_evaluation_bounds_the_experts_and_leaves_training_alone(lazy: bool) -> None:
    torch.manual_seed(0)
    hard, soft = Comet(3, 16, 3, hard_evaluation=True, lazy=lazy).double(), Comet(3, 16, 3).double()
    hard.load_state_dict(soft.state_dict())
    x_TD = tokens(20).detach()
    assert_same(hard(x_TD).dense(), soft(x_TD).dense(), 1e-12)
    route = hard.eval()(x_TD)
    assert torch.bincount(route.token_N, minlength=20).max() <= 3
    assert torch.bincount(soft.eval()(x_TD).token_N).max() == 16
    followed = torch.stack([descend_hard(soft, x_D) for x_D in x_TD])
    assert torch.equal(route.dense() > 0, followed)


def descend_hard(gate: Comet, x_D: Tensor) -> Tensor:
    """(n,) bool: the leaves that the trees reach when each split takes its likelier side, n a power of two."""
    chosen = torch.zeros(gate.num_experts, dtype=torch.bool)
    for tree in range(gate.k):
        node = 0
        while node < gate.num_experts - 1:
            t = gate.split_weight[tree, node] @ x_D + gate.split_bias[tree, node]
            node = 2 * node + (1 if t >= 0 else 2)
        chosen[node - (gate.num_experts - 1)] = True
    return chosen


def test_hard_evaluation_takes_the_left_side_at_one_half() -> None:
    gate = Comet(2, 4, 1, hard_evaluation=True).eval()
    with torch.no_grad():
        gate.split_bias.zero_()
    assert gate(torch.zeros(1, 2)).slot_N.tolist() == [0]


def test_static_gate_has_biases_only_and_ignores_its_tokens() -> None:
    gate = Comet(3, 6, 2, static=True, balance_weight=0.1)
    assert {name for name, _ in gate.named_parameters()} == {"split_bias", "leaf_bias"}
    dense_TE = gate(torch.randn(4, 3)).dense()
    assert torch.equal(dense_TE, dense_TE[:1].expand(4, 6))
    assert torch.equal(gate(torch.zeros(1, 3)).dense(), dense_TE[:1])


def test_split_balance_is_least_for_even_splits_and_log_2_a_split_there() -> None:
    even = split_balance(torch.tensor([[[1.0, 2.0]], [[2.0, 4.0]]]))
    assert even.item() == pytest.approx(2 * math.log(2), rel=1e-5)
    for left in (0.0, 0.5, 1.5, 2.0):
        assert split_balance(torch.tensor([[[left, 2.0]], [[2.0, 4.0]]])) > 1.1 * even


def test_split_balance_is_off_in_evaluation_and_without_weight() -> None:
    gate = build("comet_balance", 6, 2)
    assert set(gate(tokens(3)).aux) == {"entropy", "split_balance"}
    assert set(gate.eval()(tokens(3)).aux) == {"entropy"}
    assert set(build("comet", 6, 2)(tokens(3)).aux) == {"entropy"}


def test_descending_the_split_balance_evens_out_the_splits() -> None:
    torch.manual_seed(0)
    gate = Comet(3, 8, 2, entropy_weight=0.0, balance_weight=1.0)
    torch.nn.init.uniform_(gate.split_bias, 0.1, 0.4)
    x_TD = torch.randn(200, 3)

    def unevenness() -> float:
        return (leaf_mass(gate, x_TD).mean(dim=0) - 1 / 8).abs().max().item()

    before, optimizer = unevenness(), torch.optim.Adam(gate.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        gate(x_TD).aux["split_balance"].backward()
        optimizer.step()
    assert unevenness() < 0.1 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_active": 0}, "max_active must be at least 1, got 0"), ({"lazy": True, "static": True}, "static=True")],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Comet(3, 4, **options)


def test_lazy_and_static_is_a_fault_of_the_configuration() -> None:
    assert list(CometConfig().validation_errors(4)) == []
    assert list(CometConfig(k=5).validation_errors(4)) == ["k=5 exceeds num_experts=4; allowed: 1..4"]
    assert next(CometConfig(lazy=True, static=True).validation_errors(4)).startswith("lazy=true: ")


def test_config_passes_every_option() -> None:
    options = {"max_active": 3, "hard_evaluation": True, "balance_weight": 0.1, "static": False, "lazy": True}
    gate = CometConfig(**options).build(4, 6, GateContext())
    assert {name: getattr(gate, name) for name in options} == options
    assert CometConfig(static=True).build(4, 6, GateContext()).static
