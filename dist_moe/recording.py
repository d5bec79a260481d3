"""Numbers to record, from anywhere: gates, experts, callbacks, recipes.

    from dist_moe.recording import record
    record("gate/entropy", entropy)                  # a 0-dim tensor or a number; the mean over calls and ranks
    record("gate/tokens_dropped", dropped, "sum")

Within a training step of ``fit`` every tracker of the run sees the number under its name, reduced over micro-batches
and ranks. Elsewhere (in an evaluation, or where nobody trains) a call does nothing. Tensors stay on their device until
the ranks' numbers are collected, every ``train.log_every`` steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Reduce = Literal["sum", "mean", "max"]


@dataclass
class Recorded:
    """A number of this rank in one step: ``value`` summed (or its maximum) over ``count`` calls."""

    reduce: Reduce
    value: Tensor | float
    count: int = 1


class Recorder:
    """Takes in the numbers of one training step of this rank. ``numbers``: by name."""

    def __init__(self) -> None:
        self.numbers: dict[str, Recorded] = {}

    def add(self, name: str, value: Tensor | float, reduce: Reduce) -> None:
        """Take in one number. Raises ValueError if ``name`` was recorded with another ``reduce`` in this step."""
        value = value if isinstance(value, (int, float)) else value.detach()
        known = self.numbers.get(name)
        if known is None:
            self.numbers[name] = Recorded(reduce, value)
            return
        if known.reduce != reduce:
            raise ValueError(f"{name!r} is recorded as {known.reduce} and as {reduce} in the same step")
        if reduce == "max":
            known.value = max(known.value, value)
        else:
            known.value = known.value + value
        known.count += 1


_current: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def record(name: str, value: Tensor | float, reduce: Reduce = "mean") -> None:
    """Record a number of the training step that is under way.

    ``name``: TensorBoard's tag, for example "gate/entropy". ``value``: a number or a tensor of one element.
    ``reduce``: how the calls of a step, of all micro-batches and ranks, become one number. A name that no rank
    records in a step is absent from that step.
    """
    recorder = _current.get()
    if recorder is not None:
        recorder.add(name, value, reduce)


@contextmanager
def recording(recorder: Recorder | None) -> Iterator[None]:
    """Give ``recorder`` what is recorded within, in this thread; None: nobody, as in an evaluation."""
    before = _current.set(recorder)
    try:
        yield
    finally:
        _current.reset(before)
