"""SIGTERM and SIGINT ask the training loop to stop at the next safe place."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """``signal_number``: the signal that asked, 0 while none has."""

    def __init__(self) -> None:
        self.signal_number = 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number == signal.SIGINT == number:
            raise KeyboardInterrupt  # asked twice at the keyboard: stop now, without a checkpoint
        self.signal_number = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen to both signals inside the block; outside, they do what they did before."""
    request = StopRequest()
    before = {number: signal.signal(number, request._remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
