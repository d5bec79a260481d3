"""Which pairs make up each step: a function of (seed, step) alone, the same for every layout."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.movielens import PairTable
from dist_moe.errors import UserError


@dataclass(frozen=True)
class PairBatch:
    """One rank's share of a step. ``user_B``, ``item_B``: int64; ``rating_B``: fp32, 0 = not rated.

    ``pairs_in_step``, ``rated_in_step``: sizes of the whole step over all ranks and micro-batches,
    by which sums are divided so that a loss does not depend on how the step is shared out.
    """

    user_B: Tensor
    item_B: Tensor
    rating_B: Tensor
    pairs_in_step: int
    rated_in_step: int

    @classmethod
    def take(cls, pairs: PairTable, index_B: NDArray[np.int64], pairs_in_step: int, rated_in_step: int) -> PairBatch:
        columns = (pairs.user_N[index_B], pairs.item_N[index_B], pairs.rating_N[index_B])
        user_B, item_B, rating_B = (torch.from_numpy(np.asarray(column)) for column in columns)
        return cls(user_B.long(), item_B.long(), rating_B.float(), pairs_in_step, rated_in_step)

    def to(self, device: torch.device) -> PairBatch:
        user_B, item_B, rating_B = (x.to(device, non_blocking=True) for x in (self.user_B, self.item_B, self.rating_B))
        return PairBatch(user_B, item_B, rating_B, self.pairs_in_step, self.rated_in_step)


class PairFeed:
    """Shuffled passes over ``pairs``; each step's pairs are dealt out in order to micro-batches and ranks.

    The pairs left over at the end of an epoch are not used in that epoch. Raises UserError if there
    are fewer pairs than one batch.
    """

    def __init__(
        self,
        pairs: PairTable,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        device: torch.device | None = None,
    ) -> None:
        if len(pairs) < batch_size:
            raise UserError(f"train.batch_size={batch_size} is larger than the {len(pairs)} training pairs")
        self._pairs = pairs
        self._batch_size = batch_size
        self._rank = rank
        self._device = device or torch.device("cpu")
        self._shape = (accumulation, world_size, batch_size // (accumulation * world_size))
        self._order = lru_cache(maxsize=1)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(pairs)))

    @property
    def steps_per_epoch(self) -> int:
        return len(self._pairs) // self._batch_size

    def indices(self, step: int) -> NDArray[np.int64]:
        """The (batch_size,) rows of ``pairs`` that step ``step`` (from 0) uses, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self._batch_size
        order: NDArray[np.int64] = self._order(epoch)
        return order[start : start + self._batch_size]

    def micro_batches(self, step: int) -> list[PairBatch]:
        index = self.indices(step)
        rated = int((self._pairs.rating_N[index] > 0).sum())
        mine = index.reshape(self._shape)[:, self._rank]
        return [PairBatch.take(self._pairs, index_B, len(index), rated).to(self._device) for index_B in mine]


def shard_batches(pairs: PairTable, batch_size: int, *, rank: int, world_size: int) -> list[NDArray[np.int64]]:
    """Rows of ``pairs`` for this rank, in order, in batches; as many (some empty) on every rank."""
    per_rank = -(-len(pairs) // world_size)
    mine = np.arange(rank * per_rank, min((rank + 1) * per_rank, len(pairs)), dtype=np.int64)
    count = -(-per_rank // batch_size)
    return [mine[i * batch_size : (i + 1) * batch_size] for i in range(count)]
