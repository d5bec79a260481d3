"""Ranks as threads that take turns: one runs at a time, rank 0 first, each until it meets the others or ends.

    turn     rank 0          rank 1          rank 2          the last to come shares out
    lap 1    ... meet(sum)   ... meet(sum)   ... meet(sum)   sum -> a copy for each
    lap 2    takes, ...      takes, ...      takes, ...
             meet(gather)    meet(gather)    ends            error: not all are at the same meeting

A lap is one turn of every rank. A rank that meets hands the turn on and waits for nothing but its next turn, which
comes in the next lap, when all have met or an error ends them: no two ranks can wait for each other. One thread at a
time holds the turn (a semaphore per rank), so shared state needs no lock, except where the watching thread takes the
turn away from a rank that is lost.

So the order of everything that happens is always the same, a rank that does not come to a meeting is
noticed at once, and each rank can have random numbers of its own although torch has one generator.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dist_moe.parallel.stacks import stacks_of_threads

Result = TypeVar("Result")
ShareOut = Callable[[list[Any]], Sequence[Any]]
"""Objects that all ranks brought to a meeting -> those that they take away, both in rank order."""

UNWINDING_S = 5.0
"""How long ranks may take to end after one has been given up, or the caller been interrupted."""


class _Abandoned(BaseException):
    """Ends a rank because another one has failed; not an Exception, which the rank's own code might handle."""


@dataclass(frozen=True)
class _Visit:
    """A rank at a meeting: ``what`` is the same for all who meet."""

    what: str
    brought: Any
    share_out: ShareOut


class Lockstep(Generic[Result]):
    """Runs a function on each of ``size`` ranks, once. ``deadline_s``: how long a turn may last; None: for ever.

    A rank starts with the random numbers (of the CPU and the current GPU) and the modes (gradient,
    inference, autocast, GPU stream, context variables) of the caller. What it draws does not disturb the
    others. In the end the caller goes on with the random numbers of rank 0.
    """

    def __init__(self, size: int, deadline_s: float | None) -> None:
        self._size = size
        self._deadline_s = deadline_s
        self._turn = [threading.Semaphore(0) for _ in range(size)]
        self._changing_turns = threading.Lock()
        self._holder, self._since = 0, time.monotonic()
        self._visits: dict[int, _Visit] = {}
        self._takeaways: dict[int, Any] = {}
        self._results: dict[int, Result] = {}
        self._ended: set[int] = set()
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._random_states = [_random_state()] * size

    def run(self, function: Callable[[int], Result]) -> list[Result]:
        """Call ``function(rank)`` on every rank, each in a thread; return the results in rank order.

        Raises what the first rank to fail raised; RuntimeError if the ranks do not all come to the same
        meeting; TimeoutError, which names the rank and its place, if one keeps its turn too long.
        """
        modes = _modes_of_this_thread()

        def main(rank: int) -> None:
            try:
                self._take_turn(rank)
                with modes():
                    self._results[rank] = function(rank)
            except _Abandoned:
                pass
            except BaseException as error:
                error.add_note(f"on emulated rank {rank} of {self._size}")
                self._error = self._error or error  # the first error counts; every rank ends at its next turn
            finally:
                self._ended.add(rank)
                self._close_lap_after(rank)
                self._pass_on(rank)

        threads = [
            threading.Thread(target=copy_context().run, args=(main, rank), name=f"rank {rank}", daemon=True)
            for rank in range(self._size)
        ]
        for thread in threads:
            thread.start()
        self._turn[0].release()
        try:
            self._watch(threads)
        except BaseException as error:  # the caller is interrupted
            self._error = self._error or error
            self._over.wait(UNWINDING_S)
            raise
        finally:
            _set_random_state(self._random_states[0])
        if self._error is not None:
            raise self._error
        return [self._results[rank] for rank in range(self._size)]

    def meet(self, rank: int, what: str, brought: Any, share_out: ShareOut) -> Any:
        """Bring something, let the other ranks run until they meet too, and take a share away.

        The last one to come shares out for all, so that nobody can alter meanwhile what it brought.
        """
        if self._error is not None:
            raise _Abandoned
        self._visits[rank] = _Visit(what, brought, share_out)
        self._close_lap_after(rank)  # the last rank shares out before anybody's next turn
        self._pass_on(rank)
        self._take_turn(rank)
        return self._takeaways.pop(rank)

    def _close_lap_after(self, rank: int) -> None:
        """After the last rank's turn: has everybody come to the same meeting, or everybody ended?"""
        # Ranks run in order, so a lap is over when the highest rank meets or ends. A lower rank that has ended while
        # others meet has left no visit, which the check finds.
        if rank < self._size - 1 or self._error is not None or not self._visits:
            return
        visits, self._visits = self._visits, {}
        meetings: dict[str, list[int]] = {}
        for r in range(self._size):
            meetings.setdefault(visits[r].what if r in visits else "the end of their function", []).append(r)
        try:
            if len(meetings) > 1:
                places = "; ".join(f"ranks {ranks} are at {what}" for what, ranks in meetings.items())
                raise RuntimeError(f"not all ranks issue the same collectives in the same order: {places}")
            shares = visits[0].share_out([visits[r].brought for r in range(self._size)])
            self._takeaways = dict(enumerate(shares))
        except Exception as error:
            self._error = self._error or error

    def _take_turn(self, rank: int) -> None:
        self._turn[rank].acquire()
        if self._error is not None:
            raise _Abandoned
        _set_random_state(self._random_states[rank])

    def _pass_on(self, rank: int) -> None:
        if self._error is None:
            self._random_states[rank] = _random_state()
        with self._changing_turns:
            if self._holder == rank:  # or else it was given up meanwhile
                self._give_turn_after(rank)

    def _give_turn_after(self, rank: int) -> None:
        following = ((rank + step) % self._size for step in range(1, self._size + 1))
        holder = next((r for r in following if r not in self._ended), None)
        if holder is None:
            self._over.set()
            return
        self._holder, self._since = holder, time.monotonic()
        self._turn[holder].release()

    def _watch(self, threads: list[threading.Thread]) -> None:
        """Wait for the end of all ranks, or give up the one that keeps its turn too long."""
        while not self._over.wait(self._time_left()):
            with self._changing_turns:
                if (left := self._time_left()) is None or left > 0:
                    continue
                lost = self._holder
                stack = stacks_of_threads().get(threads[lost].ident or 0, [])
                place = "".join(traceback.format_list(stack[-3:]))
                late = f"rank {lost} ran for {self._deadline_s} s without meeting the others; it is at\n{place}"
                self._error = self._error or TimeoutError(late)
                self._ended.add(lost)
                self._turn[lost].release()  # so that it ends, should it ever come back
                self._give_turn_after(lost)
            self._over.wait(UNWINDING_S)
            return

    def _time_left(self) -> float | None:
        return None if self._deadline_s is None else max(0.0, self._since + self._deadline_s - time.monotonic())


def _modes_of_this_thread() -> Callable[[], AbstractContextManager[None]]:
    """Modes that torch keeps per thread, which a rank should have like its caller: a context that takes them over."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = {
        device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    }
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def taken_over() -> Iterator[None]:
        with ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            if inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, dtype in autocast.items():
                stack.enter_context(torch.autocast(device, dtype))
            # A rank computes gradients itself. Autograd's own thread for a GPU would run the ranks' backward passes one
            # after the other, and the first would wait in its exchange for the second for ever.
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            yield

    return taken_over


def _random_state() -> list[Tensor]:
    """The states of torch's generators: of the CPU, and of the current GPU where there is one."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])
