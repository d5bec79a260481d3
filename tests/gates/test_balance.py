"""The load-balance loss: 1 for uniform routing, more for routing to the favourites, nulls as one bucket."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_moe.gates import Softmax
from dist_moe.gates.balance import load_balance
from tests.helpers.oracle import assert_same, naive_load_balance

GATE = Softmax(1, 2)


def draw(num_tokens: int, num_slots: int, k: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(num_slots)
    probability_TS = torch.randn(num_tokens, num_slots, dtype=torch.float64).softmax(dim=1)
    selected_TS = torch.zeros_like(probability_TS, dtype=torch.bool)
    return selected_TS.scatter(1, probability_TS.topk(k).indices, True), probability_TS


@pytest.mark.parametrize("num_null", [0, 1, 3])
@pytest.mark.parametrize(("num_tokens", "num_slots", "k"), [(0, 4, 1), (1, 5, 2), (7, 6, 3)])
def test_equals_naive(num_tokens: int, num_slots: int, k: int, num_null: int) -> None:
    selected_TS, probability_TS = draw(num_tokens, num_slots, k)
    chosen = [row_S.nonzero().flatten().tolist() for row_S in selected_TS]
    expected = naive_load_balance(chosen, [list(row_S) for row_S in probability_TS], num_slots, num_null)
    assert_same(load_balance(GATE, selected_TS, probability_TS, num_null), expected, 1e-12)


@pytest.mark.parametrize("num_null", [0, 2, 4])
@pytest.mark.parametrize("num_slots", [6, 9])
def test_uniform_routing_gives_one_and_a_collapsed_router_the_number_of_slots(num_slots: int, num_null: int) -> None:
    uniform_TS = torch.full((num_slots, num_slots), 1 / num_slots)
    each_its_own_TS = torch.eye(num_slots, dtype=torch.bool)
    assert load_balance(GATE, each_its_own_TS, uniform_TS, num_null).item() == pytest.approx(1)
    all_to_first_TS = torch.eye(num_slots)[:1].expand(5, num_slots)
    assert load_balance(GATE, all_to_first_TS.bool(), all_to_first_TS, num_null).item() == pytest.approx(num_slots)


def test_gradient_flows_through_the_probabilities_and_pushes_favourites_down() -> None:
    logit_TS = torch.tensor([[2.0, 0.0, 0.0]]).expand(4, 3).clone().requires_grad_()
    selected_TS = torch.tensor([[True, False, False]]).expand(4, 3)
    load_balance(GATE, selected_TS, logit_TS.softmax(dim=1)).backward()
    assert logit_TS.grad is not None
    assert bool((logit_TS.grad[:, 0] > 0).all())
    assert bool((logit_TS.grad[:, 1:] < 0).all())
