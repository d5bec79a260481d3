"""One task per group of rows, spread over the cores: each core does whole groups.

Products of few rows gain little from several threads each, and lose time to waking these. Here every
core takes a group for itself, runs all operations of it in one thread, its scratch memory staying in its
cache, and takes the next. Only a group that is a large part of the work is done by all cores together.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

SMALLEST_WORTH_A_THREAD = 2**21
"""Multiplications of a mean group below which handing groups to threads costs more than it saves (measured)."""

GroupTask = Callable[[int, Tensor], None]
"""(group, scratch memory that no other task uses meanwhile): writes its results into tensors made before."""


def across_cores(
    task: GroupTask, rows_per_group: Sequence[int], work_per_row: int, like: Tensor, parts: int = 0, width: int = 0
) -> None:
    """Run ``task`` for every group, the groups without rows too; outside of autograd.

    ``work_per_row``: multiplications that a row costs. Every core has scratch memory of (``parts``, rows, ``width``)
    numbers, for as many rows as its largest group has, in the type and on the device of ``like``. Which core does a
    group never changes its result. On an accelerator, and with one thread, one group after the other.
    """
    cores = torch.get_num_threads()
    groups = sorted(range(len(rows_per_group)), key=rows_per_group.__getitem__, reverse=True)
    mean_work = sum(rows_per_group) * work_per_row / max(len(groups), 1)
    if cores == 1 or len(groups) == 1 or like.device.type != "cpu" or mean_work < SMALLEST_WORTH_A_THREAD:
        shared = len(groups)
    else:
        shared = sum(rows * cores > sum(rows_per_group) for rows in rows_per_group)
    spread_rows = rows_per_group[groups[shared]] if shared < len(groups) else 0
    # The first core takes the large groups, each of which all cores compute together; then all cores take the others.
    scratch = [like.new_empty(parts, max(rows_per_group, default=0), width)]
    with torch.no_grad():
        for group in groups[:shared] if spread_rows else groups:
            task(group, scratch[0])
    if not spread_rows:
        return
    scratch += [like.new_empty(parts, spread_rows, width) for _ in range(cores - 1)]
    remaining, lock = iter(groups[shared:]), threading.Lock()

    @torch.no_grad()
    def work(core: int) -> None:
        while True:  # take the next group, until none is left
            with lock:
                group = next(remaining, None)
            if group is None:
                return
            task(group, scratch[core])

    helpers = [_helpers(cores).submit(work, core) for core in range(1, cores)]
    torch.set_num_threads(1)
    try:
        work(0)
    finally:
        torch.set_num_threads(cores)
        failures = [helper.exception() for helper in helpers]
    for failure in failures:
        if failure is not None:
            raise failure


@cache
def _helpers(cores: int) -> ThreadPoolExecutor:
    """Threads each of which computes alone. ``set_num_threads`` holds for the thread that calls it."""
    ready = threading.Barrier(cores)
    pool = ThreadPoolExecutor(cores - 1, "dist_moe_core", initializer=lambda: torch.set_num_threads(1))
    for _ in range(cores - 1):
        pool.submit(ready.wait)
    ready.wait()
    return pool


os.register_at_fork(after_in_child=_helpers.cache_clear)  # a forked process has none of these threads
