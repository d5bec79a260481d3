"""COMET: leaf masses, order of leaves, entropy, initialisation and vanishing gradients."""

from __future__ import annotations

import math

import pytest
import torch

from dist_moe.gates import Comet, CometConfig, GateContext
from dist_moe.gates.tree import descend
from tests.gates.cases import leaf_mass
from tests.helpers.oracle import assert_same, naive_leaf_masses


def saturate(gate: Comet) -> None:
    with torch.no_grad():
        gate.split_weight.normal_().mul_(1e6 * gate.gamma)


def test_worked_example_of_four_leaves() -> None:
    left_TKQ = torch.tensor([0.75, 0.25, 1.0]).view(1, 1, 3)
    assert descend(left_TKQ, 1 - left_TKQ)[1].tolist() == [[[0.1875, 0.5625, 0.25, 0.0]]]


@pytest.mark.parametrize("num_experts", range(2, 18))
def test_leaf_masses_equal_recursive_descent_and_sum_to_one(num_experts: int) -> None:
    torch.manual_seed(num_experts)
    left_TKQ = torch.rand(3, 2, num_experts - 1, dtype=torch.float64)
    mass_TKE = descend(left_TKQ, 1 - left_TKQ)[1]
    assert mass_TKE.shape == (3, 2, num_experts)
    for token in range(3):
        for tree in range(2):
            assert_same(mass_TKE[token, tree], torch.stack(naive_leaf_masses(list(left_TKQ[token, tree]))), 1e-15)
    assert_same(mass_TKE.sum(2), torch.ones(3, 2, dtype=torch.float64), 1e-15)


def test_parameters_names_shapes_and_initial_ranges() -> None:
    torch.manual_seed(0)
    gate = Comet(dim=64, num_experts=9, k=3, gamma=0.2)
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {
        "split_weight": (3, 8, 64),
        "split_bias": (3, 8),
        "leaf_weight": (3, 9, 64),
        "leaf_bias": (3, 9),
    }
    for name, bound in (("split_weight", 0.002), ("split_bias", 0.002), ("leaf_weight", 0.05), ("leaf_bias", 0.05)):
        values = getattr(gate, name).detach()
        assert -bound <= values.min() < -0.7 * bound, name
        assert 0.7 * bound < values.max() <= bound, name
        assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.35 if "bias" in name else 0.05), name


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (4, 1), (8, 4), (16, 2)])
def test_entropy_at_initialisation_is_about_k_log_n(num_experts: int, k: int, gamma: float) -> None:
    torch.manual_seed(0)
    route = Comet(16, num_experts, k, gamma, entropy_weight=1.0)(torch.randn(64, 16))
    assert route.aux["entropy"].item() == pytest.approx(k * math.log(num_experts), rel=0.01)


def test_entropy_of_hard_trees_is_nearly_zero_and_of_no_tokens_zero() -> None:
    torch.manual_seed(0)
    gate = Comet(4, 8, 2)
    saturate(gate)
    assert gate(torch.randn(32, 4)).aux["entropy"].abs().item() < 1e-5
    assert gate(torch.randn(0, 4)).aux["entropy"].item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_saturated_samples_give_no_split_gradient(k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    gate = Comet(4, 11, k).to(dtype)
    saturate(gate)
    x_TD = torch.randn(20, 4, dtype=dtype)
    route = gate(x_TD)
    assert set(leaf_mass(gate, x_TD).unique().tolist()) == {0.0, 1.0}
    assert int(route.tokens_per_slot.sum()) <= k * 20
    ((route.dense() * torch.randn(20, 11, dtype=dtype)).sum() + route.aux["entropy"]).backward()
    for split in (gate.split_weight, gate.split_bias):
        assert split.grad is not None
        assert torch.equal(split.grad, torch.zeros_like(split))
    for leaf in (gate.leaf_weight, gate.leaf_bias):
        assert leaf.grad is not None
        assert bool((leaf.grad != 0).any()) == (k > 1)


def test_hard_trees_weigh_their_leaves_by_softmax_and_add_equal_ones() -> None:
    gate = Comet(2, 4, 3).double()
    with torch.no_grad():
        gate.split_weight.zero_()
        gate.split_bias.copy_(torch.tensor([[9.0, 9, 9], [9.0, 9, 9], [-9.0, 9, -9]]))  # leaves 0, 0 and 3
        gate.leaf_weight.zero_()
        gate.leaf_bias.zero_()
        gate.leaf_bias[2, 3] = math.log(2.0)
    route = gate(torch.randn(1, 2, dtype=torch.float64))
    assert route.slot_N.tolist() == [0, 3]
    assert_same(route.weight_N, torch.tensor([0.5, 0.5], dtype=torch.float64), 1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 1, "k": 1}, "num_experts must be at least 2, got 1"),
        ({"k": 0}, "k must lie in 1..num_experts=4, got 0"),
        ({"k": 5}, "k must lie in 1..num_experts=4, got 5"),
        ({"gamma": 0.0}, "gamma must be positive, got 0.0"),
        ({"gamma": -1.0}, "gamma must be positive, got -1.0"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Comet(**({"dim": 3, "num_experts": 4} | arguments))


@pytest.mark.parametrize("shape", [(5, 2), (5, 4), (3,), (2, 5, 3)])
def test_wrong_token_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected tokens of shape \(T, 3\)"):
        Comet(3, 4)(torch.zeros(shape))


def test_config_builds_the_gate_it_describes() -> None:
    gate = CometConfig(k=3, gamma=0.5, entropy_weight=2.0).build(4, 6, GateContext())
    assert (gate.dim, gate.num_experts, gate.num_slots) == (4, 6, 6)
    assert (gate.k, gate.gamma, gate.entropy_weight) == (3, 0.5, 2.0)
