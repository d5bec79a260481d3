"""A process that tries cases one after the other, and is replaced when it hangs or dies."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.fuzzing.case import Area, Outcome, attempt

LIMIT_S = 10.0
"""Longest time that a case may take. One that needs more has a second try, of so much time of a processor and three
times as much by the clock: the machine may be busy with other things."""

START_S = 300.0
"""Longest time that a process may take to import all that it needs."""

MEMORY_BYTES = 6 << 30
"""The memory that a process may take: more is a fault that must not fell the machine."""


def serve(calls: Connection, area: Area, seed: int, place: Path) -> None:
    """Try the cases whose numbers come in, and send what came of each; runs in a process of its own."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # also what the libraries in Rust say on their own
        os.dup2(null, descriptor)
    sys.stdin = sys.stdin if sys.stdin and not sys.stdin.closed else open(os.devnull, encoding="utf-8")  # noqa: SIM115
    calls.send(None)  # all is imported: from here on it is the case that takes time
    while True:
        try:
            number = calls.recv()
        except EOFError:
            return
        begin = time.process_time()
        try:
            outcome = attempt(area, seed, number, place)
        except Exception:
            outcome = Outcome("traceback", "the fuzzer itself", traceback.format_exc()[-1500:])
        calls.send((outcome, time.process_time() - begin))


class Worker:
    """Tries cases of one area; use it as a context manager. ``limit_s``: see `LIMIT_S`."""

    def __init__(self, area: Area, seed: int, place: Path, limit_s: float = LIMIT_S) -> None:
        self._area, self._seed, self._place, self._limit_s = area, seed, place, limit_s
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tools.fuzzing.areas"])
        self._process: Any = None
        self._calls: Connection | None = None

    def __enter__(self) -> Worker:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def attempt(self, number: int) -> Outcome:
        """Return what comes of a case, if it hangs at the first try that of a second one with more time."""
        outcome = self._once(number, self._limit_s)
        return self._once(number, 3 * self._limit_s) if outcome.verdict == "hang" else outcome

    def _once(self, number: int, limit_s: float) -> Outcome:
        if self._calls is None:
            self._start()
        assert self._calls is not None
        self._calls.send(number)
        if not self._calls.poll(limit_s):
            self._stop()
            return Outcome("hang", f"case {number}", f"not finished after {limit_s:g} s")
        try:
            outcome: Outcome
            outcome, seconds = self._calls.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self._stop()
            return Outcome("traceback", f"case {number}", f"the process died: exit code {code}")
        if seconds > self._limit_s:
            return Outcome("hang", outcome.what, f"{seconds:.0f} s of a processor")
        return outcome

    def _start(self) -> None:
        self._calls, theirs = self._context.Pipe()
        arguments = (theirs, self._area, self._seed, self._place)
        self._process = self._context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        if not self._calls.poll(START_S):
            raise RuntimeError(f"no process was ready after {START_S:g} s")
        self._calls.recv()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._calls is not None:
            self._calls.close()
        self._process = self._calls = None
