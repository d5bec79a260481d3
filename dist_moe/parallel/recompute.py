"""Activation checkpointing: forget a computation's intermediate tensors, and repeat it in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``function(*arguments)``, of which only the arguments and the result are kept for the backward pass.

    Random numbers are drawn again as they were. The repetition always runs to its end: torch would stop
    it once it has the tensors that this rank needs, which may be before an exchange for which other ranks
    wait. Not the reentrant kind, which loses gradients of tensors that reach the loss by another way.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, early_stop=False)
    return result
