"""Every expert on every row: each bank's own way, the default of the base class, and both under vmap."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_moe.experts import DenseReLUBank, ExpertBank, FeedForwardBank
from tests.experts.naive_banks import leaves_of, naive_expert, randomise_biases, small_bert_bank, small_conv_bank
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients

AllExperts = Callable[[ExpertBank, Tensor], Tensor]


def small_dense_bank(dropout: float = 0.0) -> DenseReLUBank:
    torch.manual_seed(3)
    bank = DenseReLUBank(400, 5, 8, [2, 3, 7], dropout).double()
    randomise_biases(bank)
    return bank


def small_plain_bank() -> FeedForwardBank:
    torch.manual_seed(4)
    bank = FeedForwardBank(7, 5, 8, [2, 3, 7], activation="gelu", bias=True, out_dim=4).double()
    randomise_biases(bank)
    return bank


def small_gated_bank() -> FeedForwardBank:
    torch.manual_seed(5)
    return FeedForwardBank(7, 5, 8, [2, 3, 7], activation="silu", gated=True).double()


BANKS = [small_conv_bank, small_dense_bank, small_plain_bank, small_gated_bank, small_bert_bank]


def own(bank: ExpertBank, x_TD: Tensor) -> Tensor:
    return bank.all_experts(x_TD)


class Dense(nn.Module):
    """``all_experts`` as a forward, which is what ``functional_call`` calls."""

    def __init__(self, bank: ExpertBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.bank.all_experts(x_TD)


@pytest.mark.parametrize("all_experts", [own, ExpertBank.all_experts], ids=["own", "default"])
@pytest.mark.parametrize("build", BANKS)
def test_values_and_gradients_equal_naive(build: Callable[[], ExpertBank], all_experts: AllExperts) -> None:
    bank = build()
    x_TD = torch.rand(2, bank.dim, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([torch.stack([naive_expert(bank, e, x) for x in x_TD]) for e in range(3)])
    actual = all_experts(bank, x_TD)
    assert actual.shape == (3, 2, bank.out_dim)
    assert all(expert.any() for expert in expected)
    assert_same(actual, expected)
    cotangent = torch.randn_like(expected)
    leaves = leaves_of(bank, x_TD)
    assert_all_same(
        gradients((actual * cotangent).sum(), leaves), naive_gradients((expected * cotangent).sum(), leaves)
    )


@pytest.mark.parametrize("all_experts", [own, ExpertBank.all_experts], ids=["own", "default"])
@pytest.mark.parametrize("build", BANKS)
def test_no_rows_give_zero_gradients(build: Callable[[], ExpertBank], all_experts: AllExperts) -> None:
    bank = build()
    x_TD = torch.rand(0, bank.dim, dtype=torch.float64, requires_grad=True)
    result = all_experts(bank, x_TD)
    assert result.shape == (3, 0, bank.out_dim)
    assert not any(grad.any() for grad in gradients(result.sum(), leaves_of(bank, x_TD)).values())


@pytest.mark.filterwarnings("error")  # vmap warns where it falls back to a loop
@pytest.mark.parametrize("each_its_rows", [False, True])
@pytest.mark.parametrize("build", BANKS)
def test_vmap_over_stacked_banks_equals_one_bank_after_another(
    build: Callable[[], ExpertBank], each_its_rows: bool
) -> None:
    banks = [Dense(build()) for _ in range(4)]
    for bank in banks:
        for parameter in bank.parameters():
            nn.init.normal_(parameter, std=0.3)
    stacked, _ = torch.func.stack_module_state(banks)
    x_VTD = torch.rand(4, 3, banks[0].bank.dim, dtype=torch.float64)
    rows = x_VTD if each_its_rows else x_VTD[0]

    def loss(parameters: dict[str, Tensor], x_TD: Tensor) -> Tensor:
        return torch.func.functional_call(banks[0], parameters, (x_TD,)).square().sum()

    grads, losses = torch.vmap(torch.func.grad_and_value(loss), in_dims=(0, 0 if each_its_rows else None))(
        stacked, rows
    )
    for v, bank in enumerate(banks):
        expected = bank(x_VTD[v if each_its_rows else 0]).square().sum()
        assert expected > 0
        assert_same(losses[v], expected)
        assert_all_same(
            {name: grad[v] for name, grad in grads.items()}, gradients(expected, dict(bank.named_parameters()))
        )


def test_dropout_acts_in_training_only_and_scales_what_it_keeps() -> None:
    bank = small_dense_bank(dropout=0.5)
    x_TD = torch.rand(200, 400, dtype=torch.float64)
    kept = bank.all_experts(x_TD)
    plain = bank.eval().all_experts(x_TD)
    assert_same(plain, ExpertBank.all_experts(bank, x_TD), 1e-12)
    positive = plain > 0
    assert 0.45 < (kept[positive] == 0).double().mean() < 0.55
    assert_same(kept[kept != 0], 2 * plain[kept != 0])


@pytest.mark.filterwarnings("error")
def test_every_bank_of_a_vmap_drops_its_own_elements() -> None:
    module = Dense(small_dense_bank(dropout=0.5))
    stacked = {name: torch.stack([p.detach()] * 3) for name, p in module.named_parameters()}
    x_TD = torch.rand(100, 400, dtype=torch.float64)

    def results(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, parameters, (x_TD,))

    kept_VETF = torch.vmap(results, randomness="different")(stacked)
    plain_ETF = module.eval()(x_TD)
    positive = plain_ETF > 0
    for v in range(3):
        dropped = kept_VETF[v][positive] == 0
        assert 0.4 < dropped.double().mean() < 0.6
        both = dropped & (kept_VETF[v - 1][positive] == 0)
        assert 0.15 < both.double().mean() < 0.35
        assert_same(kept_VETF[v][positive][~dropped], 2 * plain_ETF[positive][~dropped])
