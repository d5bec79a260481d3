"""The path for accelerators on a CPU, for tests where there is no accelerator."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock


def device_path_forced() -> AbstractContextManager[Any]:
    """Inside the block CPU tensors take the path for accelerators."""
    return mock.patch("dist_moe.kernels.operands._forced", True)
