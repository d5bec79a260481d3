"""Signals that ask a run to end: before it trains, while it trains, and when somebody cannot wait.

Before (imports, data, groups that open) a signal ends the process at once, with a sentence. While training, it is a
wish that is granted at the next safe place, with a checkpoint. A second Ctrl-C ends the process at once in any case.
What was ignored when the process started (SIGHUP under nohup, SIGINT in a script's background) stays ignored.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dist_moe.screen import say_at_once

STOP_SIGNALS = (
    signal.SIGTERM,  # schedulers, pre-emption, kill
    signal.SIGINT,  # Ctrl-C
    signal.SIGHUP,  # the terminal has gone
    signal.SIGUSR1,  # Slurm's --signal, Grid Engine's -notify
    signal.SIGUSR2,  # submitit, LSF
    signal.SIGXCPU,  # the limit of processor time
)
GRACE_S = 2.0

Handler = Callable[[int, FrameType | None], Any] | int


class Interruption(KeyboardInterrupt):
    """A signal that ends the process now; ``signal_number``: which."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return f"ended by {name_of(self.signal_number)}"


class StopRequest:
    """A wish that training ends at the next safe place.

    ``signal_number``: the first signal that asked, 0 while none has. ``grace_s``: seconds after a second Ctrl-C in
    which the process may still do what leaving needs.
    """

    grace_s = GRACE_S

    def __init__(self) -> None:
        self.signal_number = 0
        self._interrupts = 0

    def take(self, number: int, frame: FrameType | None) -> None:
        """Remember the wish; as a signal's handler. Raises Interruption at the second Ctrl-C."""
        self.signal_number = self.signal_number or number
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise Interruption(number)


_taken_by: StopRequest | None = None


def not_ignored(numbers: Iterable[int]) -> list[int]:
    """Return the signals that whoever started this process has not had ignored."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def handling_signals(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Handle signals by ``handlers`` inside the block; outside, they do what they did before."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_requests(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Take signals inside the block for such a wish; ``request``: takes them, None for a new one."""
    global _taken_by
    request, before = request or StopRequest(), _taken_by
    with handling_signals(dict.fromkeys(not_ignored(STOP_SIGNALS), request.take)):
        _taken_by = request
        try:
            yield request
        finally:
            _taken_by = before


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interruption at the first signal inside the block, except within :func:`stop_requests`.

    However the block is left afterwards, Interruption is what leaves it: C++ modules swallow exceptions while they are
    imported, and what fails in their stead later is a consequence. A process that has not left ``GRACE_S`` seconds
    later, since a C++ function waits for a peer, say, is ended by a thread, and so is one that gets a second Ctrl-C.
    For the main thread of a process of our own.
    """
    raised: Interruption | None = None

    def interrupt(number: int, _frame: FrameType | None) -> None:
        nonlocal raised
        raised = Interruption(number)
        raise raised

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading,), name="dist-moe signals", daemon=True).start()
    os.register_at_fork(after_in_child=_forget_watch)  # a child's signals are not ours
    with handling_signals(dict.fromkeys(not_ignored(STOP_SIGNALS), interrupt)):
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            os.close(writing)
            if raised is not None:
                raise raised


def _forget_watch() -> None:
    signal.set_wakeup_fd(-1)


def _watch(reading: int) -> None:
    """End the process where its main thread does not: Python's handlers wait for C++ functions to return."""
    request, interrupts = _taken_by, 0
    while octets := os.read(reading, 1):
        number = octets[0]
        if number not in STOP_SIGNALS:
            continue
        if _taken_by is not request:
            request, interrupts = _taken_by, 0
        interrupts += number == signal.SIGINT
        if request is None or interrupts > 1:
            time.sleep(GRACE_S if request is None else request.grace_s)
            if interrupts > 1 or _taken_by is None:  # else the main thread has taken it for a wish meanwhile
                end_at_once(number)


def end_at_once(number: int) -> None:
    """End this process by ``number``, with a sentence, wherever its threads are."""
    if speaks_for_node():
        say_at_once(f"dist-moe: {Interruption(number)}, at once")
    os._exit(128 + number)


def name_of(number: int) -> str:
    """Return a signal's name, as people know it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def speaks_for_node() -> bool:
    """Return whether this is the process of its machine that speaks where all would say the same.

    Every process does where the launcher's variables are not those of a job of several.
    """
    rank, world_size, local_rank = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    launched = all(number.isascii() and number.isdigit() for number in (rank, world_size, local_rank))
    return not launched or int(local_rank[:9]) == 0
