"""Batches of user-item pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_moe.data.movielens import PairTable


def table(stars: list[float], dtype: type[np.int8] | type[np.float32]) -> PairTable:
    index_N = np.arange(len(stars), dtype=np.int32)
    return PairTable(index_N, 10 + index_N, np.array(stars, dtype=dtype))


@pytest.mark.parametrize(("stars", "dtype"), [([0, 3, 5, 0], np.int8), ([0, 0.5, 4.5, 0], np.float32)])
def test_a_batch_is_a_share_of_its_step(stars: list[float], dtype: type[np.int8] | type[np.float32]) -> None:
    pairs = table(stars, dtype)
    assert pairs.watched.tolist() == [False, True, True, False]
    batch = pairs.batch(np.array([2, 0]), np.array([2, 0, 1]))
    assert (batch.user_B.tolist(), batch.item_B.tolist()) == ([2, 0], [12, 10])
    assert batch.rating_B.tolist() == [stars[2], 0]
    assert {batch.user_B.dtype, batch.item_B.dtype} == {torch.int64}
    assert batch.rating_B.dtype == torch.float32
    assert (len(batch), batch.pairs_in_step, batch.examples_in_step, batch.rated_in_step) == (2, 3, 3, 2)


def test_no_rows_give_an_empty_batch() -> None:
    batch = table([1, 2], np.int8).batch(np.arange(0), np.arange(0))
    assert (len(batch), batch.pairs_in_step, batch.rated_in_step) == (0, 0, 0)
    assert batch.to(torch.device("cpu")).user_B.shape == (0,)
