"""The share of the load that every expert had, from the first step of a run to now, in a bounded number of columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_COLUMNS = 256
"""Beyond it neighbours become one column, half as many in all; a picture has no more pixels to show."""


class LoadHistory:
    """Columns of time, each the mean over some steps of the shares (L, E) that the experts of a layer had.

    Shares are kept as fp16, so that 256 columns of 60 layers of 256 experts take 8 MB.
    """

    def __init__(self) -> None:
        self.last_steps: list[int] = []
        self._columns: list[NDArray[np.float16]] = []
        self._sum_LE: NDArray[np.float64] | None = None
        self._count = self._step = 0

    def add(self, step: int, load_WLE: NDArray[np.float64]) -> None:
        """Take in the rows (W, L, E) of W steps up to ``step``; NaN where a layer has no such expert."""
        total_WL1 = np.nansum(load_WLE, axis=2, keepdims=True)
        share_LE = (load_WLE / np.where(total_WL1 > 0, total_WL1, 1.0)).sum(axis=0)
        self._sum_LE = share_LE if self._sum_LE is None else self._sum_LE + share_LE
        self._count, self._step = self._count + len(load_WLE), step

    def end_column(self) -> NDArray[np.float16] | None:
        """End the column under way if it is as long as a 256th of the run so far, and return it; else None."""
        if self._sum_LE is None or self._count * MAX_COLUMNS < self._step:
            return None
        column_LE = (self._sum_LE / self._count).astype(np.float16)
        self.put(self._step, column_LE)
        self._sum_LE, self._count = None, 0
        return column_LE

    def put(self, last_step: int, column_LE: NDArray[np.float16]) -> None:
        """Take in a column that :meth:`end_column` returned, of the steps up to ``last_step``."""
        self.last_steps.append(last_step)
        self._columns.append(column_LE)
        if len(self._columns) <= MAX_COLUMNS:
            return
        edges = [0, *self.last_steps]
        steps = np.diff(edges).astype(np.float64)
        odd, self._columns, whole = self._columns[::2], [], self._columns
        for i in range(len(odd)):
            pair, weights = np.stack(whole[2 * i : 2 * i + 2]), steps[2 * i : 2 * i + 2]
            self._columns.append(np.average(pair.astype(np.float64), axis=0, weights=weights).astype(np.float16))
        self.last_steps = [self.last_steps[min(2 * i + 1, len(whole) - 1)] for i in range(len(odd))]

    @property
    def is_empty(self) -> bool:
        """Whether no step with load was taken in yet."""
        return not self._columns and self._sum_LE is None

    def shares(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the last steps (C,) and the shares (C, L, E) of the columns, the one under way included.

        A layer's shares are 0 where it had no row; NaN where it has no such expert. Raises ValueError if there is none.
        """
        columns, last_steps = [one.astype(np.float64) for one in self._columns], list(self.last_steps)
        if self._sum_LE is not None:
            columns.append(self._sum_LE / self._count)
            last_steps.append(self._step)
        if not columns:
            raise ValueError("load: no step was taken in yet")
        return np.asarray(last_steps, dtype=np.int64), np.stack(columns)


def over_time(last_steps: NDArray[np.int64], values_CN: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return (N, width): columns (C, N) of unequal length on an axis of equal steps, from step 1 to the last one.

    Fewer than ``width`` where the steps are fewer.
    """
    width = min(width, int(last_steps[-1]))
    steps = 1 + np.arange(width) * (int(last_steps[-1]) - 1) / max(width - 1, 1)
    return values_CN[np.searchsorted(last_steps, np.round(steps))].T


def step_names(last_step: int, width: int) -> list[str]:
    """Return the step of every place on the axis of :func:`over_time`."""
    width = min(width, last_step)
    return [str(round(1 + i * (last_step - 1) / max(width - 1, 1))) for i in range(width)]
