"""DSelect-k: codes by bits, selectors, codes that are no expert's, initialisation and vanishing gradients."""

from __future__ import annotations

import math

import pytest
import torch

from dist_moe.gates import DSelectK, DSelectKConfig, GateContext
from tests.gates.cases import build, tokens
from tests.helpers.oracle import assert_same


def pick(gate: DSelectK, *experts: int) -> None:
    """Saturate selector j so that it chooses the code ``experts[j]``."""
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        for selector, expert in enumerate(experts):
            for bit in range(gate.num_bits):
                gate.bit_bias[selector, bit] = 9.0 if (expert >> bit) & 1 else -9.0


@pytest.mark.parametrize("num_experts", [2, 3, 8, 13, 16, 33])
def test_each_code_selects_the_expert_of_that_number(num_experts: int) -> None:
    gate = DSelectK(2, num_experts, 1)
    for expert in range(num_experts):
        pick(gate, expert)
        route = gate(torch.randn(1, 2))
        assert route.slot_N.tolist() == [expert]
        assert route.weight_N.tolist() == [1.0]


def test_selectors_share_by_their_alphas_and_equal_choices_add_up() -> None:
    gate = DSelectK(2, 8, 3).double()
    pick(gate, 5, 2, 5)
    with torch.no_grad():
        gate.selector_bias.copy_(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).log())
    route = gate(torch.randn(1, 2).double())
    assert route.slot_N.tolist() == [2, 5]
    assert_same(route.weight_N, torch.tensor([2 / 6, 4 / 6], dtype=torch.float64), 1e-12)


def test_token_whose_codes_are_no_experts_has_no_assignment_and_finite_gradients() -> None:
    gate = DSelectK(2, 6, 2)
    pick(gate, 6, 7)
    route = gate(torch.randn(3, 2))
    assert route.num_assignments == 0
    assert route.aux["reciprocal"].item() == pytest.approx(2e6, rel=1e-6)
    sum(route.aux.values()).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in gate.parameters())


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
@pytest.mark.parametrize(("num_experts", "k"), [(2, 1), (4, 2), (8, 4), (16, 2)])
def test_entropy_at_initialisation_is_about_k_log_n(num_experts: int, k: int, gamma: float) -> None:
    torch.manual_seed(0)
    route = DSelectK(16, num_experts, k, gamma, entropy_weight=2.0)(torch.randn(64, 16))
    assert route.aux["entropy"].item() == pytest.approx(2 * k * math.log(num_experts), rel=0.01)
    assert set(route.aux) == {"entropy"}


def test_reciprocal_penalty_does_not_grow_with_the_batch() -> None:
    torch.manual_seed(0)
    gate = DSelectK(2, 6, 3, reciprocal_weight=0.5)
    for count in (1, 7, 500):
        assert gate(torch.randn(count, 2)).aux["reciprocal"].item() == pytest.approx(0.5 * 3 * 8 / 6, rel=0.02)


def test_reciprocal_penalty_wins_back_codes_that_are_no_experts() -> None:
    torch.manual_seed(0)
    gate = DSelectK(3, 5, 2, entropy_weight=0.0)
    torch.nn.init.uniform_(gate.bit_bias, 0.1, 0.3)  # towards code 7
    x_TD, optimizer = torch.randn(50, 3), torch.optim.Adam(gate.parameters(), 0.01)
    before = gate.selection(x_TD).sum(dim=2).mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        gate(x_TD).aux["reciprocal"].backward()
        optimizer.step()
    assert before < 0.6
    assert gate.selection(x_TD).sum(dim=2).mean().item() > 0.95


@pytest.mark.parametrize("k", [1, 3])
def test_saturated_samples_give_no_bit_gradient(k: int) -> None:
    gate = build("dselect_k", 8, k, hardness=1e6)
    assert isinstance(gate, DSelectK)
    route = gate(tokens(10))
    ((route.dense() * torch.randn(10, 8).double()).sum() + route.aux["entropy"]).backward()
    for bit in (gate.bit_weight, gate.bit_bias):
        assert bit.grad is not None
        assert not bit.grad.any()
    assert gate.selector_bias.grad is not None
    assert bool(gate.selector_bias.grad.any()) == (k > 1)


def test_parameters_names_shapes_and_initial_ranges() -> None:
    torch.manual_seed(0)
    gate = DSelectK(64, 9, 3, gamma=0.2)
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {
        "bit_weight": (3, 4, 64),
        "bit_bias": (3, 4),
        "selector_weight": (3, 64),
        "selector_bias": (3,),
    }
    for name, bound in (("bit_weight", 0.002), ("selector_weight", 0.05)):
        values = getattr(gate, name).detach()
        assert -bound <= values.min() < -0.9 * bound, name
        assert 0.9 * bound < values.max() <= bound, name
    assert gate.bit_bias.abs().max() <= 0.002 < gate.selector_bias.abs().max() <= 0.05


@pytest.mark.parametrize(("num_experts", "dim", "k", "parameters"), [(16, 256, 2, 2570), (9, 128, 4, 2580)])
def test_number_of_parameters_is_that_of_the_comparison(num_experts: int, dim: int, k: int, parameters: int) -> None:
    assert sum(p.numel() for p in DSelectK(dim, num_experts, k).parameters()) == parameters


def test_static_gate_has_biases_only_and_ignores_its_tokens() -> None:
    gate = DSelectK(3, 6, 2, static=True)
    assert {name for name, _ in gate.named_parameters()} == {"bit_bias", "selector_bias"}
    dense_TE = gate(torch.randn(4, 3)).dense()
    assert torch.equal(dense_TE, dense_TE[:1].expand(4, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "k must lie in 1..num_experts=4, got 5"),
        ({"gamma": 0.0}, "gamma must be positive, got 0.0"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSelectK(3, 4, **arguments)


def test_config_builds_the_gate_it_describes() -> None:
    options = {"k": 3, "gamma": 0.5, "entropy_weight": 2.0, "reciprocal_weight": 10.0, "static": True}
    gate = DSelectKConfig(**options).build(4, 6, GateContext())
    assert {name: getattr(gate, name) for name in options} == options
