"""The dense ReLU bank: its function, and an initialisation that no layout changes."""

from __future__ import annotations

import pytest
import torch

from dist_moe.experts import DenseReLUBank
from tests.helpers.oracle import assert_same

LAYOUTS = [range(8), range(4), range(4, 8), [0, 1], [6, 7], [5], [1, 3, 4], [6, 0, 3]]


def seeded_bank(expert_ids: list[int] | range) -> DenseReLUBank:
    torch.manual_seed(11)
    return DenseReLUBank(6, 5, 8, expert_ids)


@pytest.mark.parametrize("expert_ids", LAYOUTS)
def test_an_expert_has_the_same_weights_wherever_it_lives(expert_ids: list[int] | range) -> None:
    whole, share = seeded_bank(range(8)), seeded_bank(expert_ids)
    assert share.weight.shape == (len(expert_ids), 6, 5)
    assert torch.equal(share.weight, whole.weight[list(expert_ids)])
    assert torch.equal(share.bias, whole.bias[list(expert_ids)])


@pytest.mark.parametrize("expert_ids", LAYOUTS)
def test_what_is_drawn_after_the_bank_does_not_depend_on_the_layout(expert_ids: list[int] | range) -> None:
    seeded_bank(range(8))
    expected = torch.rand(3)
    seeded_bank(expert_ids)
    assert torch.equal(torch.rand(3), expected)


def test_experts_and_banks_differ_from_each_other() -> None:
    first, second = seeded_bank(range(8)), DenseReLUBank(6, 5, 8, range(8))
    weights = [*first.weight, *second.weight]
    assert all(not torch.equal(weights[i], weights[j]) for i in range(16) for j in range(i))


def test_weights_are_glorot_uniform_and_biases_zero() -> None:
    torch.manual_seed(0)
    bank = DenseReLUBank(60, 40, 2, range(2))
    bound = (6 / 100) ** 0.5
    for weight_DF in bank.weight:
        assert 0.98 * bound < weight_DF.abs().max() <= bound
        assert weight_DF.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not bank.bias.any()


def test_every_expert_computes_its_own_rows() -> None:
    bank = DenseReLUBank(6, 5, 8, [2, 3, 7]).double()
    torch.nn.init.normal_(bank.bias)
    x_ND = torch.randn(5, 6, dtype=torch.float64)
    expert_N = [0, 0, 2, 2, 2]
    expected = [torch.relu(x @ bank.weight[e] + bank.bias[e]) for x, e in zip(x_ND, expert_N, strict=True)]
    assert_same(bank(x_ND, [2, 0, 3]), torch.stack(expected), 1e-14)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    bank = DenseReLUBank(4, 200, 2, range(2), dropout=0.5)
    x_ND = torch.randn(3, 4)
    kept = bank(x_ND, [1, 2])
    plain = bank.eval()(x_ND, [1, 2])
    assert (plain > 0).any()
    dropped = (plain > 0) & (kept == 0)
    assert 0.4 < dropped.sum() / (plain > 0).sum() < 0.6
    torch.testing.assert_close(kept[kept != 0], 2 * plain[kept != 0])


@pytest.mark.parametrize("expert_ids", [[], [0, 0], [1, 0, 1], [0, -1], [8, 7]])
def test_impossible_expert_ids_are_refused(expert_ids: list[int]) -> None:
    with pytest.raises(ValueError, match="expert_ids must"):
        DenseReLUBank(6, 5, 8, expert_ids)
