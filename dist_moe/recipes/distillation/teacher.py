"""A model that is asked and never changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_moe.engine.deepspeed.sharded_parameters import is_sharded
from dist_moe.models import MoEModel
from dist_moe.recording import recording


class Teacher:
    """``teacher(*inputs, **options)``: what ``model`` makes of them in evaluation mode, without gradients.

    Not a module, so that a student which holds one does not take it into its parameters, checkpoints, gradient
    buckets or ``train()``, whatever the engine. ``model`` stays where it is; its parameters are frozen. It draws no
    random numbers. A model with experts on several ranks is asked on all of them alike, as the student is.

    Raises ValueError if its parameters are those of an engine at ZeRO stage 3, which holds slices only.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError("a teacher needs its parameters whole: give a model that no engine at ZeRO stage 3 holds")
        self.model = model.requires_grad_(False)
        if isinstance(model, MoEModel):
            model.begin_evaluation()  # a permutation that was still being learnt counts rounded

    @torch.no_grad()
    def __call__(self, *inputs: Any, **options: Any) -> Any:
        self.model.eval()  # at every call: whoever else holds the model may have called train() on it or on a part
        with recording(None):  # its gates have nothing to say of the student's step
            return self.model(*inputs, **options)
