"""Top-k: exactly k assignments, chosen by index, a softmax over the kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dist_moe.gates import GateContext, GateSettings, SoftmaxConfig, TopK, TopKConfig
from dist_moe.gates.top_k import largest, largest_of_many
from tests.helpers.oracle import assert_same


def test_kept_logit_of_exactly_zero_counts() -> None:
    gate = TopK(2, 4, 2)
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([-1.0, 0.0, -2.0, 0.0]))
    route = gate(torch.randn(3, 2))
    assert route.slot_N.tolist() == [1, 3] * 3
    assert route.weight_N.tolist() == [0.5] * 6


@pytest.mark.parametrize("config", [TopKConfig(), SoftmaxConfig()])
def test_parameters_are_glorot_uniform_and_zero(config: GateSettings) -> None:
    torch.manual_seed(0)
    gate: Any = config.build(100, 20, GateContext())
    assert {name: tuple(p.shape) for name, p in gate.named_parameters()} == {"weight": (20, 100), "bias": (20,)}
    bound = (6 / 120) ** 0.5
    assert 0.98 * bound < gate.weight.abs().max() <= bound
    assert not gate.bias.any()


def test_a_router_without_biases() -> None:
    gate, other = TopK(3, 4, bias=False), TopK(3, 4)
    assert {name for name, _ in gate.named_parameters()} == {"weight"}
    other.load_state_dict(gate.state_dict() | {"bias": torch.zeros(4)})
    x_TD = torch.randn(6, 3)
    assert torch.equal(gate(x_TD).dense(), other(x_TD).dense())
    torch.nn.init.normal_(other.bias)
    assert not torch.equal(gate(x_TD).dense(), other(x_TD).dense())


def test_lower_slots_win_among_equals_and_kept_logits_are_chosen_by_index() -> None:
    gate = TopK(2, 40, 3)
    with torch.no_grad():
        gate.weight.zero_()
    route = gate(torch.randn(2, 2))
    assert route.slot_N.tolist() == [0, 1, 2] * 2
    assert_same(route.weight_N, torch.full((6,), 1 / 3), 1e-7)


def test_no_auxiliary_loss_without_weight_and_none_in_evaluation() -> None:
    assert TopK(2, 4)(torch.randn(3, 2)).aux == {}
    gate = TopK(2, 4, balance_weight=1.0, z_loss_weight=1.0)
    assert set(gate(torch.randn(3, 2)).aux) == {"load_balance", "z_loss"}
    assert gate.eval()(torch.randn(3, 2)).aux == {}


def test_noise_is_drawn_while_training_only_and_starts_at_softplus_of_zero() -> None:
    torch.manual_seed(0)
    gate = TopK(2, 4, noise=True)
    assert {name for name, _ in gate.named_parameters()} == {"weight", "bias", "noise_weight"}
    assert not gate.noise_weight.any()
    x_TD = torch.zeros(20000, 2)
    assert gate.logits(x_TD).std().item() == pytest.approx(math.log(2), rel=0.01)
    assert not torch.equal(gate.logits(x_TD), gate.logits(x_TD))
    gate.eval()
    assert not gate.logits(x_TD).any()
    assert "noise_weight" not in dict(TopK(2, 4).named_parameters())


def test_tiny_sigmoids_do_not_divide_zero_by_zero() -> None:
    gate = TopK(2, 4, 2, scores="sigmoid")
    with torch.no_grad():
        gate.bias.fill_(-1e4)
    assert gate(torch.zeros(1, 2)).weight_N.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scores", ["softmax_after", "softmax_before", "sigmoid"])
def test_selection_bias_changes_which_experts_are_kept_but_not_how_they_are_weighed(scores: str) -> None:
    torch.manual_seed(0)
    gate, plain = TopK(2, 4, 2, scores=scores, bias_update_rate=0.5), TopK(2, 4, 4, scores=scores)
    plain.load_state_dict({name: x for name, x in gate.state_dict().items() if name != "bias_steps"})
    gate.bias_steps.copy_(torch.tensor([0, -10, 0, 10]))
    x_TD = torch.randn(6, 2)
    dense_TE, all_TE = gate(x_TD).dense(), plain(x_TD).dense()
    assert bool((dense_TE[:, 3] > 0).all())
    assert not dense_TE[:, 1].any()
    kept_TE = dense_TE > 0
    expected_TE = all_TE * kept_TE
    if scores != "softmax_before":
        expected_TE = expected_TE / expected_TE.sum(dim=1, keepdim=True)
    assert_same(dense_TE, expected_TE, 1e-6)


def test_selection_bias_moves_against_the_load_once_a_step() -> None:
    gate = TopK(2, 4, 1, bias_update_rate=0.25)
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([0.0, 3.0, 0.0, -5.0]))
    gate(torch.randn(6, 2))
    gate(torch.randn(2, 2))
    assert gate.selections.tolist() == [0, 8, 0, 0]
    gate.end_step()
    assert gate.selection_bias.tolist() == [0.25, -0.25, 0.25, 0.25]
    assert not gate.selections.any()
    gate.end_step()  # a step without tokens moves nothing
    assert gate.selection_bias.tolist() == [0.25, -0.25, 0.25, 0.25]


def test_experts_at_the_mean_load_keep_their_bias_and_evaluation_counts_nothing() -> None:
    gate = TopK(2, 3, 1, bias_update_rate=0.25)
    gate.selections.copy_(torch.tensor([4, 5, 3]))
    gate.eval()(torch.randn(7, 2))
    gate.end_step()
    assert gate.selection_bias.tolist() == [0.0, -0.25, 0.25]


def test_selection_bias_evens_out_the_load_of_a_frozen_router() -> None:
    torch.manual_seed(0)
    gate, x_TD = TopK(3, 8, 2, scores="sigmoid", bias_update_rate=0.003), torch.randn(400, 3)
    torch.nn.init.normal_(gate.bias)
    before = gate(x_TD).tokens_per_slot.max().item()
    for _ in range(300):
        gate(x_TD)
        gate.end_step()
    assert gate(x_TD).tokens_per_slot.max().item() < 110 < 200 < before


def test_selection_bias_survives_a_checkpoint_and_bf16_to_the_bit() -> None:
    gate, loaded = (TopK(2, 4, 2, bias_update_rate=1e-3) for _ in range(2))
    gate.bias_steps.copy_(torch.tensor([1001, -1001, 7, 0]))
    assert "selections" not in gate.state_dict()
    loaded.load_state_dict(gate.bfloat16().state_dict())
    assert loaded.selection_bias.tolist() == pytest.approx([1.001, -1.001, 0.007, 0.0], rel=1e-12)


@pytest.mark.parametrize(("num_experts", "k"), [(4, 0), (4, 5), (1, 1), (4, -1)])
def test_impossible_sizes_are_refused(num_experts: int, k: int) -> None:
    with pytest.raises(ValueError, match="num_experts"):
        TopK(3, num_experts, k)


def test_config_builds_the_gate_it_describes() -> None:
    options = {"scores": "sigmoid", "balance_weight": 0.1, "z_loss_weight": 0.2, "bias_update_rate": 0.3}
    gate = TopKConfig(k=3, noise=True, **options).build(4, 6, GateContext())
    assert (gate.dim, gate.num_experts, gate.k) == (4, 6, 3)
    assert gate.noise_weight is not None
    assert {name: getattr(gate, name) for name in options} == options


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_the_largest_of_many_are_those_of_a_stable_sort(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    few_values_TE = torch.randint(4, (200, 6), generator=generator).float()  # ties, at the edge of k and elsewhere
    distinct_TE = torch.rand(200, 6, generator=generator)
    for score_TE in (few_values_TE, distinct_TE, distinct_TE[:0], torch.zeros(3, 6)):
        assert torch.equal(largest_of_many(score_TE, k), largest(score_TE, k))


def test_a_weight_that_underflows_is_no_assignment() -> None:
    gate = TopK(1, 3, k=2)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[0.0], [500.0], [1.0]]))
    route = gate(torch.tensor([[1.0], [0.0]]))
    assert route.slot_N.tolist() == [1, 0, 1]
