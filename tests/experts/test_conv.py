"""The convolutional bank: the sizes of the paper, odd sides, what it refuses, lower precision."""

from __future__ import annotations

import pytest
import torch

from dist_moe.experts import ConvBank
from tests.experts.naive_banks import leaves_of, naive_expert, small_bank
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients

PAPER_SHAPES = {
    "conv1_weight": (10, 1, 5, 5),
    "conv1_bias": (10,),
    "conv2_weight": (20, 10, 5, 5),
    "conv2_bias": (20,),
    "dense1_weight": (720, 50),
    "dense1_bias": (50,),
    "dense2_weight": (50, 50),
    "dense2_bias": (50,),
}


def paper_bank(expert_ids: range | list[int] = range(5), num_experts: int = 5) -> ConvBank:
    torch.manual_seed(11)
    return ConvBank(36, num_experts, expert_ids)


def test_parameters_at_the_paper_sizes() -> None:
    bank = paper_bank()
    assert {name: tuple(p.shape[1:]) for name, p in bank.named_parameters()} == PAPER_SHAPES
    assert all(len(parameter) == 5 for parameter in bank.parameters())
    assert (bank.dim, bank.out_dim) == (1296, 50)
    assert bank(torch.rand(7, 1296), [1, 2, 0, 4, 0]).shape == (7, 50)


@pytest.mark.parametrize("side", [16, 19])
def test_pools_drop_an_odd_last_row_and_column(side: int) -> None:
    bank = ConvBank(side, 2, [1], channels=(2, 3), units=(5, 4)).double()
    x_ND = torch.rand(2, side * side, dtype=torch.float64, requires_grad=True)
    expected, actual = torch.stack([naive_expert(bank, 0, x) for x in x_ND]), bank(x_ND, [2])
    assert_same(actual, expected)
    leaves = leaves_of(bank, x_ND)
    assert_all_same(gradients(actual.square().sum(), leaves), naive_gradients(expected.square().sum(), leaves))


@pytest.mark.parametrize("side", [0, 5, 12, 15])
def test_images_too_small_for_the_network_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match="side must be at least 16"):
        ConvBank(side, 2, range(2))


@pytest.mark.parametrize("rows_per_expert", [[3, 0], [1, 1, 0], [1, 1, 1, 0]])
def test_counts_that_do_not_fit_are_refused(rows_per_expert: list[int]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        small_bank("conv")(torch.rand(3, 400, dtype=torch.float64), rows_per_expert)


def test_autocast_computes_in_the_lower_precision() -> None:
    bank = paper_bank()
    x_ND = torch.rand(9, 1296)
    with torch.autocast("cpu", torch.bfloat16):
        forward, dense = bank(x_ND, [9, 0, 0, 0, 0]), bank.all_experts(x_ND)[0]
    assert forward.dtype == dense.dtype == torch.bfloat16
    exact = bank(x_ND, [9, 0, 0, 0, 0])
    for result in (forward, dense):
        torch.testing.assert_close(result.float(), exact, rtol=0.05, atol=0.02)
