"""The line on the screen: what it says, on terminals of several widths and in a log."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from dist_moe.engine.monitor.monitor import ProgressLine, fitted, progress_fields

LONGEST: dict[str, Any] = {
    "loss": 10.1234,
    "examples_per_second": 321.0,
    "tokens_per_second": 123_456.0,
    "lr": 0.00025,
    "grad_norm": 123.456,
    "peak_memory_gib": 123.4,
    "active_experts": 12.34,
    "wire_bytes": 123.4e6,
}


def on_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, show: Callable[[], None]) -> list[str]:
    """What a terminal of so many columns was given, by lines and their repetitions."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    pieces: list[bytes] = []
    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setattr("sys.stderr", screen)
        reader = threading.Thread(target=read_all, args=(ours, pieces))
        reader.start()
        show()
    reader.join()
    os.close(ours)
    text = b"".join(pieces).decode()
    return [line for line in re.split(r"[\r\n]+", text.replace("\x1b[A", "")) if line.strip()]


def read_all(descriptor: int, pieces: list[bytes]) -> None:
    with suppress(OSError):  # EIO: nobody has the other end any more
        while piece := os.read(descriptor, 4096):
            pieces.append(piece)


def show_two_windows() -> None:
    line = ProgressLine(1_000_000, 99_990)
    line.update([LONGEST | {"step": 100_000}])
    line.say("validation after step 100000: auc 0.9")
    line._bar.last_print_t -= 1  # type: ignore[union-attr]
    line.update([{name: x for name, x in LONGEST.items() if name != "peak_memory_gib"} | {"step": 100_010}])
    line.close()


@pytest.mark.parametrize(
    ("columns", "shown", "dropped"),
    [
        (160, ["tokens/s", "lr", "grad", "GiB", "experts/token", "MB exchanged"], []),
        (100, ["tokens/s", "lr", "grad", "GiB"], ["experts/token", "exchanged"]),
        (80, ["tokens/s"], ["GiB", "experts/token", "exchanged"]),
        (50, ["loss"], ["tokens/s", "lr", "exchanged"]),
    ],
)
def test_a_terminal_has_as_many_numbers_as_it_is_wide(
    columns: int, shown: list[str], dropped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = on_terminal(columns, monkeypatch, show_two_windows)
    assert "validation after step 100000: auc 0.9" in lines, "a line of its own"
    assert max(map(len, lines)) <= columns
    last = lines[-1]
    assert re.match(r"100010/1000000 .*\| [\d:]+ left, loss 10.1234", last)
    assert [word for word in shown if word not in last] == []
    assert [word for word in dropped if word in last] == []


def test_a_log_has_plain_lines_with_every_number(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(20, 0)
    line.update([LONGEST | {"step": 10}])
    line.update([LONGEST | {"step": 11}])
    line.update([{name: x for name, x in LONGEST.items() if name != "tokens_per_second"} | {"step": 20}])
    line.close()
    first, last = capsys.readouterr().err.splitlines()
    numbers = "lr 0.00025, grad 123, 123.4 GiB, 12.34 experts/token, 123.4 MB exchanged"
    assert re.fullmatch(re.escape(f"step 10/20: loss 10.1234, 123.5 k tokens/s, {numbers}, ") + r"\d+:\d\d left", first)
    assert last.startswith("step 20/20: loss 10.1234, ")
    assert last.endswith("0:00 left")


def test_a_record_without_tokens_has_examples_and_without_experts_none() -> None:
    record = {"loss": 1.0, "examples_per_second": 999.6, "lr": 5e-5, "grad_norm": 0.25, "wire_bytes": 0.0}
    assert progress_fields(record) == ["loss 1.0000", "1000 examples/s", "lr 5e-05", "grad 0.25", "0 B exchanged"]
    assert fitted(progress_fields(record), 0) == "loss 1.0000"
