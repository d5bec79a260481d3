"""One live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class ProgressLine:
    """Step, loss, examples/s, active experts per token, bytes exchanged and time left, on stderr."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total = total_steps
        self._first = first_step
        self._started = time.monotonic()
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def update(self, records: list[dict[str, Any]]) -> None:
        """Show the last of the new records."""
        latest = records[-1]
        active = f"{latest['active_experts']:.2f} experts/token, " if "active_experts" in latest else ""
        text = (
            f"loss {latest['loss']:.4f}, {_count(latest['examples_per_second'])} examples/s, "
            f"{active}{_count(latest['wire_bytes'])}B exchanged"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(len(records))
        elif latest["step"] == self._total or time.monotonic() > self._last_line + SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            per_step = (time.monotonic() - self._started) / (latest["step"] - self._first)
            minutes, seconds = divmod(round(per_step * (self._total - latest["step"])), 60)
            left = f"{minutes}:{seconds:02d} left"
            print(f"step {latest['step']}/{self._total}: {text}, {left}", file=sys.stderr)

    def say(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the live line as it is."""
        if self._bar is not None:
            self._bar.close()


def _count(number: float) -> str:
    """Return a number in short, for example '1.2 M'."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} "
