"""Which pairs make up a step: a function of seed and step, whoever computes it."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_moe.data.batches import ShuffledFeed, shard_batches, spread_over
from dist_moe.data.movielens import PairBatch, PairTable
from dist_moe.errors import UserError

PAIRS, BATCH = 103, 16


def numbered(count: int) -> PairTable:
    """Pair i is (user i, item 2i), rated 1 to 5 or not at all."""
    index_N = np.arange(count, dtype=np.int32)
    return PairTable(index_N, 2 * index_N, (index_N % 6).astype(np.int8))


def users_of(batches: list[PairBatch]) -> list[int]:
    return [user for batch in batches for user in batch.user_B.tolist()]


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 3))
def test_an_epoch_uses_no_pair_twice(seed: int, batch_size: int, epoch: int) -> None:
    feed = ShuffledFeed(numbered(PAIRS), batch_size, seed)
    assert feed.steps_per_epoch == PAIRS // batch_size
    first = epoch * feed.steps_per_epoch
    used = [i for step in range(first, first + feed.steps_per_epoch) for i in feed.indices(step).tolist()]
    assert len(used) == feed.steps_per_epoch * batch_size
    assert len(set(used)) == len(used)
    assert set(used) <= set(range(PAIRS))


def test_every_pair_comes_up_in_the_end() -> None:
    feed = ShuffledFeed(numbered(PAIRS), BATCH, 0)
    used = Counter(i for step in range(20 * feed.steps_per_epoch) for i in feed.indices(step).tolist())
    assert set(used) == set(range(PAIRS))
    assert max(used.values()) <= 20


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    feeds = [ShuffledFeed(numbered(PAIRS), BATCH, seed) for seed in (0, 1)]
    steps = (0, feeds[0].steps_per_epoch, 2 * feeds[0].steps_per_epoch)
    orders = {tuple(feed.indices(step).tolist()) for feed in feeds for step in steps}
    assert len(orders) == 6


def test_steps_may_be_asked_for_in_any_order() -> None:
    once, again = (ShuffledFeed(numbered(PAIRS), BATCH, 5) for _ in range(2))
    forwards = {step: once.indices(step).tolist() for step in range(20)}
    assert {step: again.indices(step).tolist() for step in reversed(range(20))} == forwards


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 2), (1, 4), (2, 1), (2, 4), (4, 2), (8, 2)])
def test_every_layout_shares_out_the_same_global_batch(world_size: int, accumulation: int) -> None:
    pairs = numbered(PAIRS)
    whole = ShuffledFeed(pairs, BATCH, 3)
    feeds = [
        ShuffledFeed(pairs, BATCH, 3, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    for step in (0, 1, 7, 30):
        shares = [feed.micro_batches(step) for feed in feeds]
        assert {len(share) for share in shares} == {accumulation}
        assert {len(batch.user_B) for share in shares for batch in share} == {BATCH // (world_size * accumulation)}
        in_turn = [share[micro] for micro in range(accumulation) for share in shares]
        assert users_of(in_turn) == users_of(whole.micro_batches(step)) == whole.indices(step).tolist()


def test_a_batch_carries_its_pairs_and_the_sizes_of_its_step() -> None:
    feed = ShuffledFeed(numbered(PAIRS), BATCH, 3, rank=1, world_size=2, accumulation=2)
    rated = int((numbered(PAIRS).rating_N[feed.indices(4)] > 0).sum())
    for batch in feed.micro_batches(4):
        assert (batch.user_B.dtype, batch.item_B.dtype, batch.rating_B.dtype) == (
            torch.int64,
            torch.int64,
            torch.float32,
        )
        assert batch.item_B.tolist() == (2 * batch.user_B).tolist()
        assert batch.rating_B.tolist() == (batch.user_B % 6).tolist()
        assert (batch.examples_in_step, batch.rated_in_step) == (BATCH, rated)
        assert (batch.examples_in_step, len(batch)) == (BATCH, BATCH // 4)


def test_fewer_pairs_than_a_batch() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size=104.*103"):
        ShuffledFeed(numbered(PAIRS), PAIRS + 1, 0)
    assert ShuffledFeed(numbered(PAIRS), PAIRS, 0).steps_per_epoch == 1


@given(st.integers(0, 60), st.integers(1, 70))
def test_rows_spread_over_a_table(count: int, limit: int) -> None:
    rows = spread_over(count, limit).tolist()
    assert len(rows) == min(count, limit)
    distances = {after - before for before, after in pairwise([*rows, count])}
    assert max(distances, default=0) - min(distances, default=0) <= 1


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 9))
def test_shards_cover_everything_once_in_order(count: int, batch_size: int, world_size: int) -> None:
    pairs = numbered(count)
    shards = [shard_batches(pairs, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [i for shard in shards for batch in shard for i in batch.tolist()] == list(range(count))
    assert len({len(shard) for shard in shards}) == 1
    assert all(len(batch) <= batch_size for shard in shards for batch in shard)


def rated(stars: list[float], dtype: type[np.int8] | type[np.float32]) -> PairTable:
    index_N = np.arange(len(stars), dtype=np.int32)
    return PairTable(index_N, 10 + index_N, np.array(stars, dtype=dtype))


@pytest.mark.parametrize(("stars", "dtype"), [([0, 3, 5, 0], np.int8), ([0, 0.5, 4.5, 0], np.float32)])
def test_a_batch_is_a_share_of_its_step(stars: list[float], dtype: type[np.int8] | type[np.float32]) -> None:
    pairs = rated(stars, dtype)
    assert pairs.watched.tolist() == [False, True, True, False]
    batch = pairs.batch(np.array([2, 0]), np.array([2, 0, 1]))
    assert (batch.user_B.tolist(), batch.item_B.tolist()) == ([2, 0], [12, 10])
    assert batch.rating_B.tolist() == [stars[2], 0]
    assert {batch.user_B.dtype, batch.item_B.dtype} == {torch.int64}
    assert batch.rating_B.dtype == torch.float32
    assert (len(batch), batch.examples_in_step, batch.examples_in_step, batch.rated_in_step) == (2, 3, 3, 2)


def test_no_rows_give_an_empty_batch() -> None:
    batch = rated([1, 2], np.int8).batch(np.arange(0), np.arange(0))
    assert (len(batch), batch.examples_in_step, batch.rated_in_step) == (0, 0, 0)
    assert batch.to(torch.device("cpu")).user_B.shape == (0,)
