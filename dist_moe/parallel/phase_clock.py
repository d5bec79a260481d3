"""Seconds of gate, dispatch, experts and combine in a step, forward and backward, measured where they happen.

A mark is an identity between two phases: going forward it begins the one, and the gradient that comes back
through it begins the other. All of a layer's time lies between two marks:

    tokens -0- gates -1- dispatch -2- experts -3- combine -4- sums
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

PHASES = ("gate", "dispatch", "experts", "combine")
"""``gate``: with the permutation and the union of the gates' pairs."""


class PhaseClock:
    """Seconds of the phases of all layers that share it. Off until :meth:`start`; off, it costs a look at a flag.
    On a GPU it records events and waits for nothing.

    Dispatch holds the shared expert; dispatch and combine hold the waiting for other ranks. Backward, the gates'
    time ends with the gradient of the layer's tokens; where tokens have none, with the backward pass.
    """

    def __init__(self) -> None:
        self.running = False
        self._device = torch.device("cpu")
        self._marks: list[tuple[str | None, Any]] = []

    def start(self, device: torch.device) -> None:
        """Measure all layers that share this clock from now on."""
        self.running, self._device, self._marks = True, device, []

    def stop(self) -> list[float]:
        """Stop, and return seconds by phase since the start, in the order of PHASES; zeros if it was off.

        Waits for the GPU.
        """
        if not self.running:
            return [0.0] * len(PHASES)
        self.enter(None)
        self.running = False
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = dict.fromkeys((*PHASES, None), 0.0)
        for (phase, begun), (_, ended) in pairwise(self._marks):
            seconds[phase] += begun.elapsed_time(ended) / 1e3 if self._device.type == "cuda" else ended - begun
        self._marks = []
        return [seconds[phase] for phase in PHASES]

    def enter(self, phase: str | None) -> None:
        """Begin ``phase``; None: no part of the layer."""
        if not self.running:
            return
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def mark(self, forward: str | None, backward: str | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return ``tensors``, of which ``forward`` begins here; where their gradients pass, ``backward`` begins.

        While the clock is off, the very tensors.
        """
        return _Mark.apply(self, forward, backward, *tensors) if self.running else tensors


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, clock: PhaseClock, forward: str | None, backward: str | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.clock, ctx.phase = clock, backward
        ctx.set_materialize_grads(False)
        marked = tuple(x.view_as(x) for x in tensors)
        ctx.mark_non_differentiable(
            *(x for x, flows in zip(marked, ctx.needs_input_grad[3:], strict=True) if not flows)
        )
        clock.enter(forward)
        return marked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        clock: PhaseClock = ctx.clock
        clock.enter(ctx.phase)
        if ctx.phase == "combine":
            Variable._execution_engine.queue_callback(lambda: clock.enter(None))
        return None, None, None, *grads
