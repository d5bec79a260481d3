"""The one place that says whether a computation takes the path made for accelerators.

On that path the host never waits for the device: how many rows each expert has stays a tensor there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RowCounts = list[int] | Tensor
"""Rows per group: on the host, or (E,) int64 on the device of the rows, which the host has not seen."""

_forced = False  # True in tests of the path on a CPU


def on_device_path(x: Tensor) -> bool:
    """Whether what ``x`` takes part in is computed without the host's knowledge of its values."""
    return _forced or x.is_cuda


def counts_on_host(rows_per_group: RowCounts) -> list[int]:
    """Return the counts as integers. Waits for the device if they live there."""
    return rows_per_group.tolist() if isinstance(rows_per_group, Tensor) else rows_per_group


def ends_of_groups(rows_per_group: Tensor) -> Tensor:
    """Return (E,) int32 for (E,) counts: the row after the last of each group, as ``grouped_mm`` wants it."""
    return rows_per_group.cumsum(0, dtype=torch.int32)


def start_of_each(group_N: Tensor, num_groups: int) -> Tensor:
    """Return (E + 1,) int64: where each of the values 0..E-1 starts in ``group_N``, which rises; then its length."""
    return torch.searchsorted(group_N, torch.arange(num_groups + 1, device=group_N.device))


def check_counts(rows_per_group: RowCounts, num_groups: int, num_rows: int) -> None:
    """Raise ValueError where there is not a count per group, or they do not sum to ``num_rows``.

    The sum of counts on a device is not checked: the host would have to wait for it.
    """
    counts: Sequence[int] | Tensor = rows_per_group
    total = num_rows if isinstance(counts, Tensor) else sum(counts)
    if len(counts) != num_groups or total != num_rows:
        raise ValueError(f"{num_groups} groups and {num_rows} rows do not fit the counts {rows_per_group}")
