"""Progress of a long preparation, for the person who waits for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Never, TypeVar

from tqdm import tqdm

from dist_moe.screen import say

T = TypeVar("T")


class Progress:
    """Bars on a terminal, plain lines elsewhere (log files, ``torchrun``), nothing if not enabled.

    Everything goes to stderr, so stdout stays free for results.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._bars = enabled and sys.stderr.isatty()

    def say(self, line: str) -> None:
        """Print one line, without tearing a bar that is being drawn."""
        if self._bars:
            with suppress(OSError, ValueError):  # the terminal may have gone
                tqdm.write(line, file=sys.stderr)
        elif self.enabled:
            say(line)

    def track(self, items: Iterable[T], what: str, *, total: int, unit: str) -> Iterable[T]:
        """Yield ``items``, counted by a bar (or announced by one line)."""
        if self._bars:
            return tqdm(items, desc=what, total=total, unit=unit, file=sys.stderr, leave=False)
        self.say(f"{what}: {total:,} {unit}")
        return items

    def meter(self, what: str, total_bytes: int | None) -> tqdm[Never]:
        """Return a bar to be advanced by hand with ``update(bytes)``; use it as a context manager."""
        if not self._bars:
            size = "" if total_bytes is None else f": {total_bytes / 1e6:.1f} MB"
            self.say(f"{what}{size}")
        hidden = not self._bars
        return tqdm(
            desc=what, total=total_bytes, unit="B", unit_scale=True, file=sys.stderr, leave=False, disable=hidden
        )
