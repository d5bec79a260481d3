"""Which examples make up each step: a function of (seed, step) alone, the same for every layout."""

from __future__ import annotations

from collections.abc import Sized
from copy import copy
from functools import lru_cache
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from dist_moe.errors import UserError


class Batch(Protocol):
    """One rank's share of a step: tensors whose first dimension is B, and the size of the whole step."""

    @property
    def examples_in_step(self) -> int:
        """Examples of the step over all ranks and micro-batches, by which sums are divided."""
        ...

    @property
    def tokens_in_step(self) -> int:
        """Tokens of the step over all ranks and micro-batches: rows that are routed, one per example or several."""
        ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device."""
        ...


class TensorBatch:
    """Base of batches: frozen dataclasses whose first field is a tensor with B rows."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def to(self, device: torch.device) -> Self:
        """Return the batch with its tensors on a device."""
        moved = copy(self)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        vars(moved).update({name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})
        return moved


class ExampleBatch(TensorBatch):
    """Base of batches in which each example is one token; the model is called with the first tensor alone."""

    examples_in_step: int

    @property
    def tokens_in_step(self) -> int:
        """Tokens of the step over all ranks and micro-batches."""
        return self.examples_in_step

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """Arguments of the model."""
        return (next(iter(vars(self).values())),)


B = TypeVar("B", bound=Batch)
B_co = TypeVar("B_co", bound=Batch, covariant=True)


class Examples(Protocol[B_co]):
    """A table whose rows are examples."""

    def __len__(self) -> int: ...

    def batch(self, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> B_co:
        """Return the rows ``index_B``, a share of a step that uses ``step_index`` over all ranks and micro-batches."""
        ...


class ShuffledFeed(Generic[B]):
    """Shuffled passes over ``examples``; each step's rows are dealt out in order to micro-batches and ranks.

    The examples left over at the end of an epoch are not used in that epoch. Raises UserError if there
    are fewer examples than one batch.
    """

    def __init__(
        self,
        examples: Examples[B],
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        device: torch.device | None = None,
    ) -> None:
        count = len(examples)
        if count < batch_size:
            raise UserError(f"train.batch_size={batch_size} is larger than the {count} training examples")
        self._examples = examples
        self._batch_size = batch_size
        self._rank = rank
        self._device = device or torch.device("cpu")
        self._shape = (accumulation, world_size, batch_size // (accumulation * world_size))
        self._order = lru_cache(maxsize=1)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(count))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the examples."""
        return len(self._examples) // self._batch_size

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the (batch_size,) rows of ``examples`` that step ``step`` (from 0) uses, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self._batch_size
        order: NDArray[np.int64] = self._order(epoch)
        return order[start : start + self._batch_size]

    def micro_batches(self, step: int) -> list[B]:
        """Return this rank's share of step ``step`` (from 0), on the device, one batch per accumulation."""
        index = self.indices(step)
        mine = index.reshape(self._shape)[:, self._rank]
        return [self._examples.batch(index_B, index).to(self._device) for index_B in mine]


def spread_over(count: int, limit: int) -> NDArray[np.int64]:
    """Return ``limit`` of ``count`` rows, or all if there are fewer, at equal distances: a sample of all parts."""
    taken = min(count, limit)
    return np.arange(taken, dtype=np.int64) * count // max(taken, 1)


def shard_batches(examples: Sized, batch_size: int, *, rank: int, world_size: int) -> list[NDArray[np.int64]]:
    """Return rows of ``examples`` for this rank, in order, in batches; as many (some empty) on every rank."""
    per_rank = -(-len(examples) // world_size)
    mine = np.arange(rank * per_rank, min((rank + 1) * per_rank, len(examples)), dtype=np.int64)
    count = -(-per_rank // batch_size)
    return [mine[i * batch_size : (i + 1) * batch_size] for i in range(count)]
