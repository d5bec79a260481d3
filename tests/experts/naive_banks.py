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
    return _naive_dense(x_D, naive_matrix(bank, "weight", expert), bank.bias[expert])


def naive_matrix(bank: ExpertBank, name: str, expert: int) -> Tensor:
    """(in, out) matrix of a local expert, stored whole or not: V^T U^T, and one row of S after the other."""
    if name not in bank.factored:
        return bank.get_parameter(name)[expert]
    product = bank.get_parameter(f"{name}_into")[expert] @ bank.get_parameter(f"{name}_back")[expert]
    columns = list(product.unbind(1))
    if hasattr(bank, f"{name}_sparse"):
        ids = bank.get_buffer(f"{name}_row_ids")[bank.expert_ids[expert]].tolist()
        for number, row_D in zip(ids, bank.get_parameter(f"{name}_sparse")[expert].T, strict=True):
            if number >= 0:
                columns[number] = columns[number] + row_D
    return torch.stack(columns, dim=1)


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
    up, down = (naive_matrix(bank, name, expert) for name in ("up", "down"))
    hidden_F = _naive_affine(x_D, up, None if bank.up_bias is None else bank.up_bias[expert])
    if not bank.gated:
        hidden_F = _NAIVE_ACTIVATIONS[bank.activation](hidden_F)
    else:
        hidden_F = (
            _NAIVE_ACTIVATIONS[bank.activation](_naive_affine(x_D, naive_matrix(bank, "gate", expert), None)) * hidden_F
        )
    return _naive_affine(hidden_F, down, None if bank.down_bias is None else bank.down_bias[expert])


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


def factored(bank: ExpertBank, rank: int, rows: dict[str, int] | None = None) -> ExpertBank:
    """The bank with its matrices stored as U V + S, of which each expert has other rows, and some of them none."""
    bank.factor(rank, rows)
    base = int(torch.randint(2**31, ()))
    for name in bank.factored:
        if not hasattr(bank, f"{name}_sparse"):
            continue
        sparse_EDQ, outputs = bank.get_parameter(f"{name}_sparse"), bank.get_parameter(f"{name}_back").shape[2]
        for expert, id_Q in enumerate(bank.get_buffer(f"{name}_row_ids")):
            generator = torch.Generator().manual_seed(base + expert)
            id_Q.copy_(torch.randperm(outputs, generator=generator)[: len(id_Q)])
            id_Q[: (0, 1, len(id_Q))[expert % 3]] = -1
            if expert in bank.expert_ids:
                torch.nn.init.uniform_(sparse_EDQ[bank.expert_ids.index(expert)], -1, 1, generator)
    return bank


MLP = {"units": [5, 4], "activation": "silu", "feature_gate": {"number": 2, "rank": 3}}
BANKS: dict[str, Callable[[Sequence[int]], ExpertBank]] = {
    "conv": lambda ids: ConvBank(20, 8, ids, channels=(2, 3), units=(5, 4)),
    "dense": lambda ids: DenseReLUBank(12, 5, 8, ids),
    "plain": lambda ids: FeedForwardBank(7, 5, 8, ids, activation="relu", out_dim=4),
    "gated": lambda ids: FeedForwardBank(7, 5, 8, ids, activation="silu", gated=True, bias=True),
    "mlp": lambda ids: MlpBank(7, MlpConfig.model_validate(MLP), 8, ids),
    "bert": lambda ids: BertFeedForwardBank(7, 5, 8, ids, dropout=0.0, norm_eps=1e-3),
    "factored dense": lambda ids: factored(DenseReLUBank(12, 5, 8, ids), 2),
    "factored gated": lambda ids: factored(
        FeedForwardBank(7, 5, 8, ids, activation="silu", gated=True, bias=True), 3, {"up": 4, "gate": 0, "down": 5}
    ),
    "factored bert": lambda ids: factored(BertFeedForwardBank(7, 5, 8, ids, dropout=0.0, norm_eps=1e-3), 2),
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
