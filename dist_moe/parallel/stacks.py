"""Stacks of other threads, for those who wait for them."""

from __future__ import annotations

import faulthandler
import os
import re
import traceback

_THREAD = re.compile(r"(?:Current t|T)hread 0x([0-9a-f]+)")
_CALL = re.compile(r'  File "(.*)", line (\d+) in (.*)')

Stack = list[traceback.FrameSummary]


def stacks_of_threads() -> dict[int, Stack]:
    """Return the stack of each thread of this process by its id, innermost last: at most its 100 innermost calls.

    They are taken down by one C function, which holds the interpreter's lock throughout. Walking
    ``sys._current_frames()`` in Python lets the other threads run between two steps; of a thread at work it met, now
    and then, memory in which there was no frame any more, and the process died.
    """
    with open(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read().decode(errors="replace")
    stacks: dict[int, Stack] = {}
    stack: Stack = []
    for line in text.splitlines():
        if thread := _THREAD.match(line):
            stack = stacks.setdefault(int(thread[1], 16), [])
        elif call := _CALL.match(line):
            stack.insert(0, traceback.FrameSummary(call[1], int(call[2]), call[3]))
    return stacks
