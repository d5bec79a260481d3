"""Experts one row at a time: convolutions and pools by their windows, every product written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dist_moe.experts import (
    BertFeedForwardBank,
    ConvBank,
    DenseReLUBank,
    ExpertBank,
    FeedForwardBank,
    MlpBank,
    MlpConfig,
)
from tests.models.multi_task.naive import naive_expert as naive_mlp


def naive_expert(bank: ExpertBank, expert: int, x_D: Tensor) -> Tensor:
    """(F,) result of local expert ``expert`` on one row, without dropout."""
    if isinstance(bank, ConvBank):
        return naive_conv_expert(bank, expert, x_D)
    if isinstance(bank, BertFeedForwardBank):
        return naive_bert_expert(bank, expert, x_D)
    if isinstance(bank, FeedForwardBank):
        return naive_feed_forward_expert(bank, expert, x_D)
    if isinstance(bank, MlpBank):
        return naive_mlp(bank, expert, [x_D])[0]
    assert isinstance(bank, DenseReLUBank)
    return _naive_dense(x_D, bank.weight[expert], bank.bias[expert])


def naive_conv_expert(bank: ConvBank, expert: int, x_D: Tensor) -> Tensor:
    maps = x_D.view(1, bank.side, bank.side)
    maps = _naive_pool(_naive_conv(maps, bank.conv1_weight[expert], bank.conv1_bias[expert]))
    maps = _naive_pool(_naive_conv(maps, bank.conv2_weight[expert], bank.conv2_bias[expert]))
    hidden_F = _naive_dense(maps.flatten(), bank.dense1_weight[expert], bank.dense1_bias[expert])
    return _naive_dense(hidden_F, bank.dense2_weight[expert], bank.dense2_bias[expert])


def _naive_conv(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(C, side, side) -> (filters, side - 4, side - 4), with its ReLU."""
    positions = range(maps.shape[1] - 4)
    values = [
        ((maps[:, row : row + 5, column : column + 5] * weight).sum((1, 2, 3)) + bias).clamp(min=0)
        for row in positions
        for column in positions
    ]
    return torch.stack(values, dim=1).view(len(weight), len(positions), len(positions))


def naive_feed_forward_expert(bank: FeedForwardBank, expert: int, x_D: Tensor) -> Tensor:
    hidden_F = _naive_affine(x_D, bank.up[expert], None if bank.up_bias is None else bank.up_bias[expert])
    if bank.gate is None:
        hidden_F = _NAIVE_ACTIVATIONS[bank.activation](hidden_F)
    else:
        hidden_F = _NAIVE_ACTIVATIONS[bank.activation](_naive_affine(x_D, bank.gate[expert], None)) * hidden_F
    return _naive_affine(hidden_F, bank.down[expert], None if bank.down_bias is None else bank.down_bias[expert])


def naive_bert_expert(bank: BertFeedForwardBank, expert: int, x_D: Tensor) -> Tensor:
    sum_D = x_D + naive_feed_forward_expert(bank, expert, x_D)
    mean = sum(sum_D) / len(sum_D)
    variance = sum((value - mean) ** 2 for value in sum_D) / len(sum_D)
    return (sum_D - mean) / (variance + bank.norm_eps) ** 0.5 * bank.norm_weight[expert] + bank.norm_bias[expert]


def _naive_pool(maps: Tensor) -> Tensor:
    """Largest of every whole 2x2 window."""
    positions = range(maps.shape[1] // 2)
    values = [
        maps[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].amax((1, 2))
        for row in positions
        for column in positions
    ]
    return torch.stack(values, dim=1).view(len(maps), len(positions), len(positions))


def _naive_dense(x_D: Tensor, weight_DF: Tensor, bias_F: Tensor) -> Tensor:
    return _naive_affine(x_D, weight_DF, bias_F).clamp(min=0)


def _naive_affine(x_D: Tensor, weight_DF: Tensor, bias_F: Tensor | None) -> Tensor:
    products_F = torch.stack([(x_D * w_D).sum() for w_D in weight_DF.T])
    return products_F if bias_F is None else products_F + bias_F


_NAIVE_ACTIVATIONS = {
    "relu": lambda h: h * (h > 0),
    "gelu": lambda h: h * (1 + torch.erf(h / 2**0.5)) / 2,
    "silu": lambda h: h / (1 + torch.exp(-h)),
}


def randomise_biases(bank: ExpertBank) -> None:
    """Zero biases would hide a bias that is left out or given to the wrong expert."""
    for name, parameter in bank.named_parameters():
        if "bias" in name:
            torch.nn.init.uniform_(parameter, -0.2, 0.2)


MLP = {"units": [5, 4], "activation": "silu", "feature_gate": {"number": 2, "rank": 3}}
BANKS: dict[str, Callable[[Sequence[int]], ExpertBank]] = {
    "conv": lambda ids: ConvBank(20, 8, ids, channels=(2, 3), units=(5, 4)),
    "dense": lambda ids: DenseReLUBank(12, 5, 8, ids),
    "plain": lambda ids: FeedForwardBank(7, 5, 8, ids, activation="relu", out_dim=4),
    "gated": lambda ids: FeedForwardBank(7, 5, 8, ids, activation="silu", gated=True, bias=True),
    "mlp": lambda ids: MlpBank(7, MlpConfig.model_validate(MLP), 8, ids),
    "bert": lambda ids: BertFeedForwardBank(7, 5, 8, ids, dropout=0.0, norm_eps=1e-3),
}
"""Banks of every type without dropout, of some of 8 experts."""


def small_bank(name: str) -> ExpertBank:
    """Experts 2, 3 and 7 in fp64, every scale and bias drawn."""
    torch.manual_seed(5)
    bank = BANKS[name]([2, 3, 7]).double()
    randomise_biases(bank)
    if isinstance(bank, BertFeedForwardBank):
        torch.nn.init.uniform_(bank.norm_weight, 0.5, 1.5)
    if isinstance(bank, MlpBank):
        torch.nn.init.uniform_(bank.back, -1, 1)
    return bank


def leaves_of(bank: ExpertBank, x_ND: Tensor) -> dict[str, Tensor]:
    return dict(bank.named_parameters()) | {"x": x_ND}
