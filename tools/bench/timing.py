"""Time by turns: what disturbs the machine for a while disturbs all candidates alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    before_each: Callable[[], object] | None = None,
    clock: Clock = "wall",
) -> dict[str, list[float]]:
    """Seconds of every repetition, by candidate: A B C, B C A, ...; each runs once before, uncounted.

    ``clock``: "cpu" counts the processor time of this process, which other processes do not lengthen; to be used with
    one thread, and not where ranks wait for each other. ``before_each``: called, outside of the time taken, before
    every call: on several ranks, a barrier.
    """
    now = CLOCKS[clock]
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions + 1):
        first = repetition % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if before_each is not None:
                before_each()
            started = now()
            candidates[name]()
            taken = now() - started
            if repetition > 0:
                seconds[name].append(taken)
    return seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        low, median, high = (float(q) for q in np.quantile(numbers, [0.25, 0.5, 0.75]))
        return cls(median, low, high)


def ratio(seconds: Sequence[float], base: Sequence[float]) -> Spread:
    """Spread of ``seconds[i] / base[i]``: both from the same round of :func:`interleaved`."""
    return Spread.of([mine / other for mine, other in zip(seconds, base, strict=True)])
