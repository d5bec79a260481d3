"""MoEBERT's expert bank: the whole block of BERT in each expert, one row at a time in fp64."""

from __future__ import annotations

import pytest
import torch

from dist_moe.experts import BertFeedForwardBank
from tests.experts.naive_banks import leaves_of, naive_expert, small_bert_bank
from tests.helpers.device_path import device_path_forced
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gradients

COUNTS = [[2, 0, 3], [1, 1, 1], [0, 0, 4]]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_values_and_gradients_equal_naive(counts: list[int], on_device: bool) -> None:
    bank = small_bert_bank()
    x_ND = torch.randn(sum(counts), bank.dim, dtype=torch.float64, requires_grad=True)
    expert_N = [expert for expert, rows in enumerate(counts) for _ in range(rows)]
    expected = torch.stack([naive_expert(bank, expert, x) for expert, x in zip(expert_N, x_ND, strict=True)])
    if on_device:
        with device_path_forced():
            actual = bank(x_ND, torch.tensor(counts))
    else:
        actual = bank(x_ND, counts)
    assert_same(actual, expected)
    cotangent, leaves = torch.randn_like(expected), leaves_of(bank, x_ND)
    assert len(leaves) == 7
    assert_all_same(
        gradients((actual * cotangent).sum(), leaves), naive_gradients((expected * cotangent).sum(), leaves)
    )


def test_no_rows_at_all_give_zero_gradients() -> None:
    bank = small_bert_bank()
    x_ND = torch.rand(0, bank.dim, dtype=torch.float64, requires_grad=True)
    result = bank(x_ND, [0, 0, 0])
    assert result.shape == (0, bank.dim)
    assert not any(grad.any() for grad in gradients(result.sum(), leaves_of(bank, x_ND)).values())


@pytest.mark.parametrize("every", [False, True])
def test_dropout_is_on_what_the_network_gives_and_not_on_the_residual(every: bool) -> None:
    bank = BertFeedForwardBank(200, 5, 2, range(2), dropout=0.25).double()
    torch.nn.init.constant_(bank.down_bias, 10.0)
    torch.nn.init.zeros_(bank.down)
    x_ND = torch.zeros(60, 200, dtype=torch.float64)
    dropped_ND = bank.all_experts(x_ND)[1] if every else bank(x_ND, [0, 60])
    low_ND = dropped_ND < 0  # the network gives 10 everywhere: what stays is above the row's mean, the rest below
    assert 0.23 < low_ND.double().mean() < 0.27
    x_ND[:, 0] = 1000.0  # so large a residual stands out whatever is dropped
    kept = bank.all_experts(x_ND)[1] if every else bank(x_ND, [0, 60])
    assert (kept[:, 0] > 10).all()
    plain = bank.eval()(x_ND, [0, 60])
    assert torch.equal(plain, bank(x_ND, [0, 60]))


@pytest.mark.parametrize("expert_ids", [range(8), range(4, 8), [5], [6, 0, 3]], ids=str)
def test_an_expert_has_the_same_weights_wherever_it_lives(expert_ids: list[int] | range) -> None:
    def seeded(ids: list[int] | range) -> dict[str, torch.Tensor]:
        torch.manual_seed(11)
        return dict(BertFeedForwardBank(6, 5, 8, ids).named_parameters())

    whole, share = seeded(range(8)), seeded(expert_ids)
    assert share.keys() == {"up", "down", "up_bias", "down_bias", "norm_weight", "norm_bias"}
    for name, parameter in share.items():
        assert torch.equal(parameter, whole[name][list(expert_ids)])
