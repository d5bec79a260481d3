"""Weights into a model that holds a part of the experts: each by its global id, and no other number of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.checkpoint import place_weights
from dist_moe.errors import UserError
from dist_moe.experts import DenseReLUBank


class Share(nn.Module):
    """Experts 1 and 3 of four, and a layer that every rank has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.bank = DenseReLUBank(3, 5, 4, [1, 3])


def weights(experts: int) -> dict[str, Tensor]:
    whole = {name: torch.randn(x.shape) for name, x in Share().named_parameters()}
    stacks = {n: torch.randn(experts, *x.shape[1:]) for n, x in whole.items() if n.startswith("bank")}
    return whole | stacks


def test_a_rank_takes_its_own_experts() -> None:
    model, given = Share(), weights(4)
    place_weights(model, given)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, given[name][[1, 3]] if name.startswith("bank") else given[name]), name


@pytest.mark.parametrize("experts", [2, 3, 8])
def test_another_number_of_experts_is_refused_and_nothing_is_changed(experts: int) -> None:
    model = Share()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=rf"bank\.bias has shape \({experts}, 5\), the model's is \(4, 5\)"):
        place_weights(model, weights(experts))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
