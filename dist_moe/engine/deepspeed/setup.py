"""Importing DeepSpeed without its surprises."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch


def import_deepspeed() -> Any:
    """The ``deepspeed`` module, quiet, and without the shared-memory op.

    DeepSpeed compiles that op at the first ``init_distributed``: half a minute, a C++ compiler, a
    lock that hangs later runs if the build is killed, 66 MiB per rank left in /dev/shm. Only tensor
    parallel inference uses it.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
