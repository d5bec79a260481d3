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

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
ShareOut = Callable[[list[Any]], Sequence[Any]]
"""What all ranks brought to a meeting -> what each of them takes away, both in rank order."""

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
        self._random = _RandomNumbers()
        self._random_states = [self._random.state()] * size

    def run(self, function: Callable[[int], Result]) -> list[Result]:
        """Call ``function(rank)`` on every rank, each in a thread; return the results in rank order.

        Raises what the first rank to fail raised; RuntimeError if the ranks do not all come to the same
        meeting; TimeoutError, which names the rank and its place, if one keeps its turn too long.
        """
        inherited = _ModesOfThisThread()

        def main(rank: int) -> None:
            try:
                self._take_turn(rank)
                with inherited.taken_over():
                    self._results[rank] = function(rank)
            except _Abandoned:
                pass
            except BaseException as error:
                error.add_note(f"on emulated rank {rank} of {self._size}")
                self._fail(error)
            finally:
                self._end(rank)

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
            self._fail(error)
            self._over.wait(UNWINDING_S)
            raise
        finally:
            self._random.set(self._random_states[0])
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
        try:
            self._check_all_meet(visits)
            shares = visits[0].share_out([visits[r].brought for r in range(self._size)])
            self._takeaways = dict(enumerate(shares))
        except Exception as error:
            self._fail(error)

    def _check_all_meet(self, visits: dict[int, _Visit]) -> None:
        meetings: dict[str, list[int]] = {}
        for r in range(self._size):
            what = visits[r].what if r in visits else "the end of their function"
            meetings.setdefault(what, []).append(r)
        if len(meetings) > 1:
            places = "; ".join(f"ranks {ranks} are at {what}" for what, ranks in meetings.items())
            raise RuntimeError(f"not all ranks issue the same collectives in the same order: {places}")

    def _take_turn(self, rank: int) -> None:
        self._turn[rank].acquire()
        if self._error is not None:
            raise _Abandoned
        self._random.set(self._random_states[rank])

    def _end(self, rank: int) -> None:
        self._ended.add(rank)
        self._close_lap_after(rank)
        self._pass_on(rank)

    def _pass_on(self, rank: int) -> None:
        if self._error is None:
            self._random_states[rank] = self._random.state()
        with self._changing_turns:
            if self._holder == rank:  # or else it was given up meanwhile
                self._give_turn_after(rank)

    def _give_turn_after(self, rank: int) -> None:
        following = [(rank + step) % self._size for step in range(1, self._size + 1)]
        waiting = [r for r in following if r not in self._ended]
        if not waiting:
            self._over.set()
            return
        self._holder, self._since = waiting[0], time.monotonic()
        self._turn[waiting[0]].release()

    def _fail(self, error: BaseException) -> None:
        """Every rank ends when its next turn comes; the first error counts."""
        if self._error is None:
            self._error = error

    def _watch(self, threads: list[threading.Thread]) -> None:
        """Wait for the end of all ranks, or give up the one that keeps its turn too long."""
        while not self._over.wait(self._time_left()):
            with self._changing_turns:
                if (left := self._time_left()) is None or left > 0:
                    continue
                lost = self._holder
                self._fail(TimeoutError(self._describe(threads[lost], lost)))
                self._ended.add(lost)
                self._turn[lost].release()  # so that it ends, should it ever come back
                self._give_turn_after(lost)
            self._over.wait(UNWINDING_S)
            return

    def _time_left(self) -> float | None:
        return None if self._deadline_s is None else max(0.0, self._since + self._deadline_s - time.monotonic())

    def _describe(self, thread: threading.Thread, rank: int) -> str:
        frame = sys._current_frames().get(thread.ident or 0)
        place = "".join(traceback.format_stack(frame)[-3:]) if frame else ""
        return f"rank {rank} ran for {self._deadline_s} s without meeting the others; it is at\n{place}"


class _ModesOfThisThread:
    """Modes that torch keeps per thread, which a rank should have like its caller."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = {
            device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
        }
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """Within, this thread has them; and it computes gradients itself.

        Autograd's own thread for a GPU would run the ranks' backward passes one after the other, and the
        first would wait in its exchange for the second for ever.
        """
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            if self._inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for device, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(device, dtype))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            yield


class _RandomNumbers:
    """The states of torch's generators: of the CPU, and of the current GPU where there is one."""

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()

    def state(self) -> list[Tensor]:
        return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if self._on_gpu else [])

    def set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self._on_gpu:
            torch.cuda.set_rng_state(state[1])
