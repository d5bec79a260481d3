"""Sequences of tokens, and batches of them.

Documents are laid end to end, one stream per domain and part, a separator before each document and one at the
end. A stream is cut into sequences of S + 1 tokens that share one token with their neighbour, so every token
but the first is predicted exactly once. The last tokens of a stream, fewer than S, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.batches import TensorBatch

TokenIds = NDArray[np.unsignedinteger[Any]]
"""uint16, or uint32 where a tokenizer has more tokens than that can number."""


@dataclass(frozen=True)
class TokenBatch(TensorBatch):
    """One rank's share of a step: B sequences.

    ``token_BS``, ``target_BS``: int64, a token and the one that follows it. ``bytes_B``: int64, bytes of UTF-8
    text that the targets of a sequence stand for. ``domain_B``: int64. ``examples_in_step``: sequences of the
    whole step over all ranks and micro-batches, by which sums are divided.
    """

    token_BS: Tensor
    target_BS: Tensor
    bytes_B: Tensor
    domain_B: Tensor
    examples_in_step: int

    @property
    def tokens_in_step(self) -> int:
        """Tokens of the whole step: S for each of its sequences."""
        return self.examples_in_step * self.token_BS.shape[1]

    @property
    def inputs(self) -> tuple[Tensor]:
        """Arguments of the model."""
        return (self.token_BS,)


@dataclass(frozen=True)
class TokenTable:
    """N sequences of one part, in the order of their provenance; the tokens are a read-only memory map.

    ``token_M``: all streams of the part. ``start_N``: int64, where in it a sequence begins.
    ``domain_N``: int64, its domain. ``token_bytes_V``: int64, see `dist_moe.data.text.Text`. ``byte_M``: bytes of
    text that each token of ``token_M`` stands for, where its id alone does not say; else None.
    """

    token_M: TokenIds
    start_N: NDArray[np.int64]
    domain_N: NDArray[np.int64]
    token_bytes_V: NDArray[np.int64]
    sequence_length: int
    byte_M: NDArray[np.uint16] | None = None

    def __len__(self) -> int:
        return len(self.start_N)

    def windows(self, row_N: NDArray[np.int64]) -> Iterator[list[int]]:
        """Yield the tokens of each of the sequences ``row_N``: those to begin with, and the last target."""
        for start in self.start_N[row_N].tolist():
            yield self.token_M[start : start + self.sequence_length + 1].tolist()

    def batch(self, index_B: NDArray[np.int64], step_index: NDArray[np.int64]) -> TokenBatch:
        """Return the sequences ``index_B`` of a step that uses ``step_index`` over all ranks and micro-batches."""
        offset_S = np.arange(self.sequence_length + 1)
        place_BS = self.start_N[index_B][:, None] + offset_S
        window_BS = self.token_M[place_BS].astype(np.int64)
        token_BS, target_BS = np.ascontiguousarray(window_BS[:, :-1]), np.ascontiguousarray(window_BS[:, 1:])
        bytes_BS = self.token_bytes_V[target_BS] if self.byte_M is None else self.byte_M[place_BS[:, 1:]]
        columns = (token_BS, target_BS, bytes_BS.sum(axis=1, dtype=np.int64), self.domain_N[index_B])
        token, target, count, domain = map(torch.from_numpy, columns)
        return TokenBatch(token, target, count, domain, len(step_index))

    def select(self, row_N: NDArray[np.int64]) -> TokenTable:
        """Return a table of the sequences ``row_N`` alone, in this order, on the same memory map."""
        return replace(self, start_N=self.start_N[row_N], domain_N=self.domain_N[row_N])


def cut(
    token_M: TokenIds,
    stream_D: NDArray[np.int64],
    token_bytes_V: NDArray[np.int64],
    sequence_length: int,
    byte_M: NDArray[np.uint16] | None = None,
) -> TokenTable:
    """Cut the streams of a part, one per domain, into sequences.

    Args:
        token_M: the streams, one after the other.
        stream_D: their lengths, in the order of the domains.
        byte_M: see `TokenTable`.
    """
    end_D = np.cumsum(stream_D)
    starts = [
        np.arange(end - length, end - sequence_length, sequence_length, dtype=np.int64)
        for length, end in zip(stream_D, end_D, strict=True)
    ]
    domain_N = np.repeat(np.arange(len(starts), dtype=np.int64), [len(start_N) for start_N in starts])
    return TokenTable(token_M, np.concatenate(starts), domain_N, token_bytes_V, sequence_length, byte_M)
