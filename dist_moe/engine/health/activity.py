"""What this process is doing just now, for whoever has to explain why it goes no further."""

from __future__ import annotations


class Activity:
    """``phase`` of training ``step`` (from 1). ``marks`` grows with all progress. ``settled``: whether a first
    step is over, and with it whatever compiles on first use. Written by the thread that trains, read by others.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.step = 0
        self.phase = "start"
        self.marks = 0
        self.settled = False

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase begins: data, forward, backward, optimizer, evaluation, checkpoint, ..."""
        self.phase = phase
        if step is not None:
            self.settled = self.settled or 0 < self.step < step
            self.step = step
        self.marks += 1

    def beat(self) -> None:
        """The phase has come further; for phases that take long."""
        self.marks += 1


ACTIVITY = Activity()
"""Of this process."""
