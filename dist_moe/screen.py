"""Standard output and error of a command: a convenience, whose loss ends nothing that is worth more.

A terminal closes, a pipe's reader leaves, the disk of a log fills up. What a command prints beside its work may get
lost then; where printing is its work, it says so and ends.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress

_PATIENCE_MS = 10_000
"""Time for a reader that is slow, or a terminal that is held by Ctrl-S; after it, nothing more is waited for."""
_PIECE = 512
"""Bytes that a pipe takes at once or not at all, wherever it says that it takes any (POSIX's least PIPE_BUF)."""
_STANDARD_OUTPUT, _STANDARD_ERROR = 1, 2

BROKEN_PIPE = 141
"""Exit code of a program whose reader has left, as a shell gives it for one that SIGPIPE ended."""


class Screen(io.FileIO):
    """A file descriptor for text that people read.

    ``is_optional``: what cannot be written, or is not taken for 10 s, is dropped. Otherwise the first failure is raised
    as OSError and kept in ``failure``; the rest is dropped, so that nothing is raised again when the process ends.
    """

    def __init__(self, descriptor: int, *, is_optional: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.is_optional = is_optional
        self.failure: OSError | None = None
        self._patience_ms = _PATIENCE_MS

    def write(self, data: object) -> int:
        """Write all of ``data``, or drop it; returns its length either way."""
        octets = memoryview(data).cast("B")  # type: ignore[arg-type]
        if self.failure is None:
            try:
                self._put(octets)
            except OSError as error:
                if not self.is_optional:
                    self.failure = error
                    raise
        return len(octets)

    def _put(self, octets: memoryview) -> None:
        while octets:
            if self.is_optional and not takes_text(self.fileno(), self._patience_ms):
                self._patience_ms = 0
                return
            self._patience_ms = _PATIENCE_MS
            written = super().write(octets[:_PIECE] if self.is_optional else octets)
            if written is None:  # somebody made the descriptor non-blocking
                takes_text(self.fileno(), _PATIENCE_MS)
            octets = octets[written or 0 :]


def takes_text(descriptor: int, patience_ms: int) -> bool:
    """Return whether something can be written, or fails at once, within ``patience_ms``."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(patience_ms))


_output: Screen | None = None


def guard_screen() -> None:
    """Replace this process's standard streams, for good: standard error may be lost without any consequence.

    A descriptor that is closed becomes the null device: else the next file that is opened would get its number, and
    what C++ libraries print would go into that file.
    """
    global _output
    for descriptor in (0, _STANDARD_OUTPUT, _STANDARD_ERROR):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            os.set_inheritable(null, True)
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    _output = Screen(_STANDARD_OUTPUT, is_optional=False)
    error = Screen(_STANDARD_ERROR, is_optional=True)
    sys.stdout = sys.__stdout__ = _text(_output, sys.stdout)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(error, sys.stderr)  # type: ignore[misc]


def _text(screen: Screen, before: object) -> io.TextIOWrapper:
    encoding = getattr(before, "encoding", None)
    return io.TextIOWrapper(
        io.BufferedWriter(screen), encoding=encoding, errors="backslashreplace", line_buffering=True
    )


def make_output_optional() -> None:
    """Let standard output be lost without any consequence too, from here on, in a guarded process."""
    if _output is not None:
        _output.is_optional = True


def lost_output() -> OSError | None:
    """Return why standard output, which is not optional, could not be written; None if all of it was."""
    return None if _output is None else _output.failure


def is_broken_pipe(error: OSError) -> bool:
    """Return whether the reader has left, which is no fault of anybody's."""
    return error.errno == errno.EPIPE


def say(text: str) -> None:
    """Print a line on standard error, if there still is one: for use in processes that are not guarded, too."""
    with suppress(OSError, ValueError):  # ValueError: the stream was closed
        print(text, file=sys.stderr, flush=True)


def say_at_once(text: str) -> None:
    """Print a line past all buffers: from signal handlers, which may have interrupted somebody's printing."""
    with suppress(OSError):
        if takes_text(_STANDARD_ERROR, 0):
            os.write(_STANDARD_ERROR, f"{text}\n".encode(errors="backslashreplace"))
