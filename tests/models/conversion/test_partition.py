"""MoEBERT's partition: who gets which neuron, at the sizes of the paper and at small ones against a naive loop."""

from __future__ import annotations

import re

import pytest
import torch

from dist_moe.errors import UserError
from dist_moe.models.conversion import partition, ranked

SIZES = [(12, 3, 6, 3), (12, 3, 4, 0), (12, 1, 12, 12), (12, 1, 12, 0), (12, 4, 12, 12), (13, 2, 7, 3), (12, 1, 5, 2)]


def naive_partition(order: list[int], num_experts: int, width: int, shared: int) -> list[list[int]]:
    lists = []
    for expert in range(num_experts):
        neurons, rank = order[:shared], shared + expert
        while len(neurons) < width:
            neurons.append(order[rank])
            rank += num_experts
        lists.append(neurons)
    return lists


@pytest.mark.parametrize(
    ("hidden", "num_experts", "width", "shared"),
    [*SIZES, (3072, 4, 768, 512)],  # BERT-base
)
def test_equals_naive(hidden: int, num_experts: int, width: int, shared: int) -> None:
    order_H = torch.randperm(hidden)
    expected = naive_partition(order_H.tolist(), num_experts, width, shared)
    assert partition(order_H, num_experts, width, shared).tolist() == expected


def test_orders() -> None:
    importance_H = torch.tensor([2.0, 5.0, 2.0, 9.0])
    assert ranked(importance_H).tolist() == [3, 1, 0, 2]
    assert ranked(importance_H, "inverse").tolist() == [0, 2, 1, 3]
    drawn = ranked(torch.arange(100.0), "random", seed=3)
    assert sorted(drawn.tolist()) == list(range(100))
    assert torch.equal(ranked(torch.zeros(100), "random", seed=3), drawn)
    assert not torch.equal(ranked(torch.zeros(100), "random", seed=4), drawn)


@pytest.mark.parametrize(
    ("num_experts", "width", "shared", "message"),
    [
        (4, 768, 255, "4 experts of 768 neurons, 255 of them shared, take 2307 of 2000; share at least 358"),
        (2, 3000, 10, "take 5990 of 2000; experts can be at most 2000 wide"),
        (1, 2001, 5, "take 2001 of 2000; experts can be at most 2000 wide"),
        (4, 768, 769, "shared=769 neurons do not fit experts of 768; allowed: 0..768"),
    ],
)
def test_too_few_neurons_are_refused_with_what_would_do(
    num_experts: int, width: int, shared: int, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        partition(torch.arange(2000), num_experts, width, shared)


def test_the_remedy_is_one() -> None:
    assert partition(torch.arange(2000), 4, 768, 358).shape == (4, 768)
    with pytest.raises(UserError):
        partition(torch.arange(2000), 4, 768, 357)
