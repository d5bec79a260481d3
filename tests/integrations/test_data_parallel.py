"""Split experts inside torch's DDP and FSDP2: the numbers of one process."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_moe.integrations.data_parallel import (
    average_gradients,
    clip_grad_norm_,
    fully_shard_dense,
    prepare_for_ddp,
    wrap_ddp,
)
from dist_moe.parallel import ExchangeOptions
from tests.helpers.pool import on_ranks
from tests.integrations.steps import (
    CLIPPING,
    Numbers,
    assert_one_process,
    build,
    expert_world,
    plain_group,
    train,
)

Course = tuple[Numbers, list[float]]


def train_in_ddp(ep: int, by_hand: bool, micro_batches: int = 1, chunks: int = 1, **options: Any) -> Course:
    with plain_group():
        model = build(expert_world(ep, ExchangeOptions(overlap_chunks=chunks)), **options)
        ddp = DistributedDataParallel(prepare_for_ddp(model)) if by_hand else wrap_ddp(model)
        return train(ddp, lambda: clip_grad_norm_(ddp, CLIPPING), model, micro_batches)


@pytest.mark.parametrize("by_hand", [False, True])
def test_ddp(by_hand: bool) -> None:
    assert_one_process(on_ranks(2, train_in_ddp, 2, by_hand), 1e-12)


def train_in_other_ways(way: str) -> Course:
    return train_in_ddp(2, False, **WAYS[way])


WAYS: dict[str, dict[str, Any]] = {
    "accumulation": {"micro_batches": 3},
    "overlapped": {"chunks": 2},
    "recomputed": {"recompute_experts": True},
    "reentrant": {"reentrant": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_ddp_in_other_ways(way: str) -> None:
    results = on_ranks(2, train_in_other_ways, way)
    assert_one_process(results, 1e-12, micro_batches=WAYS[way].get("micro_batches", 1))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_ddp_with_copies_of_experts(micro_batches: int) -> None:
    assert_one_process(on_ranks(4, train_in_ddp, 2, False, micro_batches), 1e-12, micro_batches)


def train_without_wrapper(ep: int) -> Course:
    def clip() -> Tensor:
        average_gradients(model)
        return clip_grad_norm_(model, CLIPPING)

    with plain_group():
        model = build(expert_world(ep))
        return train(model, clip, model)


def test_no_wrapper() -> None:
    assert_one_process(on_ranks(2, train_without_wrapper, 2), 1e-12)


@pytest.mark.slow
def test_no_wrapper_with_copies_of_experts() -> None:
    assert_one_process(on_ranks(4, train_without_wrapper, 2), 1e-12)


def train_in_fsdp(ep: int, by_hand: bool) -> Course:
    with plain_group():
        model = build(expert_world(ep))
        experts = {p for block in model.blocks for p in block.moe.experts.parameters()}
        for module in [*model.blocks, model]:
            if by_hand:
                fully_shard(module, ignored_params=experts)
            else:
                fully_shard_dense(module)
        return train(model, lambda: clip_grad_norm_(model, CLIPPING), model)


@pytest.mark.parametrize("by_hand", [False, True])
def test_fsdp2(by_hand: bool) -> None:
    assert_one_process(on_ranks(2, train_in_fsdp, 2, by_hand), 1e-12)


@pytest.mark.slow
def test_fsdp2_with_copies_of_experts() -> None:
    assert_one_process(on_ranks(4, train_in_fsdp, 2, False), 1e-12)
