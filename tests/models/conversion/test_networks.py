"""One dense network as experts: identities of the split, of copies, of all neurons in one expert; gated ones too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.kernels import FeedForwardWeights, feed_forward_reference
from dist_moe.models.conversion import copies, split_exactly, take_neurons
from tests.helpers.oracle import assert_same

HIDDEN = 12
FORMS = [("gelu", False, True), ("relu", False, False), ("silu", True, False), ("silu", True, True)]
forms = pytest.mark.parametrize(("activation", "gated", "bias"), FORMS)


def network(gated: bool, bias: bool, dtype: torch.dtype = torch.float32) -> FeedForwardWeights:
    generator = torch.Generator().manual_seed(4)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64).to(dtype)

    return FeedForwardWeights(
        drawn(5, HIDDEN),
        drawn(HIDDEN, 3),
        drawn(5, HIDDEN) if gated else None,
        drawn(HIDDEN) if bias else None,
        drawn(3) if bias else None,
    )


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def results_of(experts: FeedForwardWeights, activation: str, x_TD: Tensor) -> Tensor:
    """(E, T, D'): every expert on every token."""
    count = len(experts.up)
    rows = feed_forward_reference(x_TD.repeat(count, 1), experts, activation, [len(x_TD)] * count)
    return rows.view(count, len(x_TD), -1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("num_experts", [1, 3, 4, HIDDEN])
@forms
def test_split_is_the_network_as_a_sum_and_as_a_mean(
    activation: str, gated: bool, bias: bool, num_experts: int, dtype: torch.dtype, tolerance: float
) -> None:
    dense, x_TD = network(gated, bias, dtype), tokens(dtype)
    expected = results_of(dense, activation, x_TD)[0]
    scale = expected.abs().max().item()
    summed = results_of(split_exactly(dense, num_experts, "sum"), activation, x_TD).sum(0)
    mean = results_of(split_exactly(dense, num_experts), activation, x_TD).mean(0)
    assert_same(summed / scale, expected / scale, tolerance)
    assert_same(mean / scale, expected / scale, tolerance)
    if num_experts > 1:
        alone = results_of(split_exactly(dense, num_experts, "sum"), activation, x_TD)[0]
        assert (alone - expected).abs().max() > 0.1


def test_split_that_does_not_come_out_even_is_refused() -> None:
    with pytest.raises(UserError, match="num_experts=5 does not divide the feed-forward width 12"):
        split_exactly(network(False, True), 5)


@forms
def test_copies_without_noise_are_the_network_whatever_the_weights(activation: str, gated: bool, bias: bool) -> None:
    dense, x_TD = network(gated, bias, torch.float64), tokens(torch.float64)
    results_ETF = results_of(copies(dense, 4), activation, x_TD)
    expected = results_of(dense, activation, x_TD)[0]
    assert all(torch.equal(result, expected) for result in results_ETF)
    weight_TE = torch.rand(6, 4, dtype=torch.float64)
    weight_TE /= weight_TE.sum(1, keepdim=True)
    assert_same(torch.einsum("te,etf->tf", weight_TE, results_ETF), expected, 1e-14)


def test_noise_is_as_large_as_said_its_own_in_every_copy_and_fixed_by_its_seed() -> None:
    dense = FeedForwardWeights(torch.randn(1, 40, 60) * 3, torch.randn(1, 60, 40) * 0.1, None, torch.randn(1, 60))
    made = copies(dense, 3, noise=0.5, seed=7)
    torch.rand(5)
    again, other = copies(dense, 3, noise=0.5, seed=7), copies(dense, 3, noise=0.5, seed=8)
    for name in ("up", "down"):
        added = getattr(made, name) - getattr(dense, name)
        for of_copy in added:
            assert of_copy.std().item() == pytest.approx(0.5 * getattr(dense, name).std().item(), rel=0.05)
        assert all(not torch.equal(added[i], added[j]) for i in range(3) for j in range(i))
        assert torch.equal(getattr(again, name), getattr(made, name))
        assert not torch.equal(getattr(other, name), getattr(made, name))
    assert made.up_bias is not None
    assert dense.up_bias is not None
    assert torch.equal(made.up_bias, dense.up_bias.repeat(3, 1))


@forms
def test_all_neurons_in_any_order_are_the_network(activation: str, gated: bool, bias: bool) -> None:
    dense, x_TD = network(gated, bias, torch.float64), tokens(torch.float64)
    order_2H = torch.stack([torch.randperm(HIDDEN), torch.arange(HIDDEN)])
    for result in results_of(take_neurons(dense, order_2H), activation, x_TD):
        assert_same(result, results_of(dense, activation, x_TD)[0], 1e-13)


def test_neurons_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match=r"neurons must lie in 0\.\.11, got 0\.\.12"):
        take_neurons(network(False, True), torch.tensor([[0, 12]]))
    with pytest.raises(ValueError, match="expected the weights of one dense network, got 2"):
        copies(copies(network(False, True), 2), 2)
