"""Keep the C library from giving freed memory back to the system between two training steps.

A step allocates and frees the same large tensors again and again. By default glibc maps each of them
anew, and every page of it is faulted in and zeroed by the kernel again: where page faults are dear
(virtual machines, sandboxes) that can cost more than the arithmetic.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER_TRIM = 2**31 - 1
_GROW_BY = 64 * 2**20


def keep_freed_memory() -> bool:
    """Ask glibc to reuse freed memory, for the rest of the process; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER_TRIM), (_M_TOP_PAD, _GROW_BY))
    return min(mallopt(option, value) for option, value in options) == 1
