"""Operands of the kernels of both kinds of device: row counts, token indices, weights and activations of networks;
and the one place that says whether a computation takes the path made for accelerators.

On that path the host never waits for the device: how many rows each expert has stays a tensor there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

RowCounts = list[int] | Tensor
"""Rows per group: on the host, or (E,) int64 on the device of the rows, which the host has not seen."""

_forced = False  # True in tests of the path on a CPU


def on_device_path(x: Tensor) -> bool:
    """Return whether what ``x`` takes part in is computed without the host's knowledge of its values."""
    return _forced or x.is_cuda


def counts_on_host(rows_per_group: RowCounts) -> list[int]:
    """Return the counts as integers. Waits for the device if they live there."""
    return rows_per_group.tolist() if isinstance(rows_per_group, Tensor) else rows_per_group


def ends_of_groups(rows_per_group: Tensor) -> Tensor:
    """Return (E,) int32 for (E,) counts: the row after the last of each group, as ``grouped_mm`` wants it."""
    return rows_per_group.cumsum(0, dtype=torch.int32)


def check_counts(rows_per_group: RowCounts, num_groups: int, num_rows: int) -> None:
    """Raise ValueError where there is not a count per group, or they do not sum to ``num_rows``.

    The sum of counts on a device is not checked: the host would have to wait for it.
    """
    counts: Sequence[int] | Tensor = rows_per_group
    total = num_rows if isinstance(counts, Tensor) else sum(counts)
    if len(counts) != num_groups or total != num_rows:
        raise ValueError(f"{num_groups} groups and {num_rows} rows do not fit the counts {rows_per_group}")


class TokenIndex(NamedTuple):
    """Which rows a token has, found once by a stable sort and used by every pass over the rows.

    ``token_N`` (N,): the token of each row. ``row_N`` (N,): the rows sorted by token, stably. ``start_T1`` (T + 1,):
    the place in ``row_N`` where each token's begin; then N."""

    token_N: Tensor
    row_N: Tensor
    start_T1: Tensor

    @classmethod
    def of(cls, token_N: Tensor, num_tokens: int) -> TokenIndex:
        """Sort rows of the tokens ``token_N``, each in 0..num_tokens-1, which come in any order."""
        row_N = stable_order(token_N, num_tokens)
        each_T1 = torch.arange(num_tokens + 1, device=token_N.device)
        return cls(token_N, row_N, torch.searchsorted(token_N[row_N], each_T1))

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T."""
        return self.start_T1.shape[0] - 1


def stable_order(key_N: Tensor, bound: int) -> Tensor:
    """Return the order that sorts ``key_N``, integers in 0..bound-1, stably."""
    if on_device_path(key_N) or bound > 2**16:
        return key_N.argsort(stable=True)
    return torch.from_numpy(np.argsort(key_N.numpy().astype(np.uint16), kind="stable"))  # a radix sort


class FeedForwardWeights(NamedTuple):
    """``up`` (E, D, F), ``down`` (E, F, D'); optional ``gate`` (E, D, F), ``up_bias`` (E, F), ``down_bias`` (E, D')."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> FeedForwardWeights:
        """Apply ``function`` to every tensor that there is."""
        rest = (None if weight is None else function(weight) for weight in self[2:])
        return FeedForwardWeights(function(self.up), function(self.down), *rest)


_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """``into(h, out)``: writes the activation of ``h``; ``backward(grad, h, out)``: ``grad`` times its derivative
    at ``h``. ``out`` may be ``grad`` itself."""

    function: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "relu": Activation(
        torch.relu,
        lambda h, out: torch.clamp_min(h, 0, out=out),
        lambda grad, h, out: _aten.threshold_backward.grad_input(grad, h, 0, grad_input=out),
    ),
    "gelu": Activation(
        torch.nn.functional.gelu,
        lambda h, out: _aten.gelu.out(h, out=out),
        lambda grad, h, out: _aten.gelu_backward.grad_input(grad, h, grad_input=out),
    ),
    "silu": Activation(
        torch.nn.functional.silu,
        lambda h, out: _aten.silu.out(h, out=out),
        lambda grad, h, out: _aten.silu_backward.grad_input(grad, h, grad_input=out),
    ),
}
"""ReLU; the exact GELU x Phi(x) (Hendrycks and Gimpel, 2016); SiLU x sigmoid(x)."""
