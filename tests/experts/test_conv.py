"""The convolutional bank: its function and gradients, and an initialisation that no layout changes."""

from __future__ import annotations

import pytest
import torch

from dist_moe.experts import ConvBank
from tests.experts.naive_banks import leaves_of, naive_expert, randomise_biases, small_conv_bank
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


@pytest.mark.parametrize(
    ("name", "fans"),
    [("conv1_weight", 25 + 250), ("conv2_weight", 250 + 500), ("dense1_weight", 770), ("dense2_weight", 100)],
)
def test_kernels_are_glorot_uniform(name: str, fans: int) -> None:
    bound = (6 / fans) ** 0.5
    for weight in paper_bank().get_parameter(name):
        assert 0.97 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert weight.mean().item() == pytest.approx(0, abs=5 * bound / weight.numel() ** 0.5)


def test_biases_start_at_zero() -> None:
    biases = [parameter for name, parameter in paper_bank().named_parameters() if name.endswith("bias")]
    assert len(biases) == 4
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize("expert_ids", [range(4), range(4, 8), [5], [1, 3, 4]])
def test_an_expert_has_the_same_weights_wherever_it_lives(expert_ids: list[int] | range) -> None:
    whole, share = paper_bank(range(8), 8), paper_bank(expert_ids, 8)
    after_share = torch.rand(3)
    for name, parameter in share.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)[list(expert_ids)]), name
    paper_bank(range(8), 8)
    assert torch.equal(torch.rand(3), after_share)


def test_experts_differ_in_every_kernel() -> None:
    for name, weight in paper_bank().named_parameters():
        if name.endswith("weight"):
            assert all(not torch.equal(weight[i], weight[j]) for i in range(5) for j in range(i)), name


@pytest.mark.parametrize("side", [16, 19, 20])
@pytest.mark.parametrize("rows_per_expert", [[2, 0, 1], [1, 1, 1], [0, 0, 2]])
def test_values_and_gradients_equal_naive(side: int, rows_per_expert: list[int]) -> None:
    bank = small_conv_bank(side, (1, 4, 6))
    x_ND = torch.rand(sum(rows_per_expert), side * side, dtype=torch.float64, requires_grad=True)
    expert_N = [expert for expert, rows in enumerate(rows_per_expert) for _ in range(rows)]
    expected = torch.stack([naive_expert(bank, expert, x) for expert, x in zip(expert_N, x_ND, strict=True)])
    actual = bank(x_ND, rows_per_expert)
    assert expected.any()
    assert_same(actual, expected)
    cotangent = torch.randn_like(expected)
    leaves = leaves_of(bank, x_ND)
    assert_all_same(
        gradients((actual * cotangent).sum(), leaves), naive_gradients((expected * cotangent).sum(), leaves)
    )


def test_no_rows_at_all_give_zero_gradients() -> None:
    bank = small_conv_bank()
    x_ND = torch.rand(0, 400, dtype=torch.float64, requires_grad=True)
    result = bank(x_ND, [0, 0, 0])
    assert result.shape == (0, 4)
    assert not any(grad.any() for grad in gradients(result.sum(), leaves_of(bank, x_ND)).values())


def test_experts_without_rows_have_zero_gradients() -> None:
    bank = paper_bank()
    x_ND = torch.rand(6, 1296)
    grads = gradients(bank(x_ND, [0, 4, 0, 2, 0]).sum(), dict(bank.named_parameters()))
    for name, grad in grads.items():
        assert [bool(expert.any()) for expert in grad] == [False, True, False, True, False], name


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    bank = paper_bank().double()
    randomise_biases(bank)
    x_ND = torch.rand(6, 1296, dtype=torch.float64)
    together = bank(x_ND, [2, 1, 0, 0, 3])
    alone = [bank(x_ND[n : n + 1], [int(e == expert) for e in range(5)]) for n, expert in enumerate([0, 0, 1, 4, 4, 4])]
    assert_same(together, torch.cat(alone), 1e-12)


@pytest.mark.parametrize("side", [0, 5, 12, 15])
def test_images_too_small_for_the_network_are_refused(side: int) -> None:
    with pytest.raises(ValueError, match="side must be at least 16"):
        ConvBank(side, 2, range(2))


@pytest.mark.parametrize("rows_per_expert", [[3, 0], [1, 1, 0], [1, 1, 1, 0]])
def test_counts_that_do_not_fit_are_refused(rows_per_expert: list[int]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        small_conv_bank()(torch.rand(3, 400, dtype=torch.float64), rows_per_expert)


def test_autocast_computes_in_the_lower_precision() -> None:
    bank = paper_bank()
    x_ND = torch.rand(9, 1296)
    with torch.autocast("cpu", torch.bfloat16):
        forward, dense = bank(x_ND, [9, 0, 0, 0, 0]), bank.all_experts(x_ND)[0]
    assert forward.dtype == dense.dtype == torch.bfloat16
    exact = bank(x_ND, [9, 0, 0, 0, 0])
    for result in (forward, dense):
        torch.testing.assert_close(result.float(), exact, rtol=0.05, atol=0.02)
