"""Recorded layers: what gates and experts gave for a batch, replayed under other tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_moe.kernels import TokenIndex, weighted_scatter
from dist_moe.layer import MoE, MoEOutput, Replay
from dist_moe.routing import Pairs, Route
from dist_moe.search.slot_table import SlotTable


@dataclass(frozen=True)
class Recording:
    """``routes``: of each gate, before the slot map. ``results_TEF``: of every expert, on every token."""

    routes: tuple[Route, ...]
    results_TEF: Tensor


class Recorder:
    """Runs a layer on all of its experts and keeps the recording."""

    def __init__(self) -> None:
        self.recording: Recording | None = None

    def __call__(self, layer: MoE, x_TD: Tensor, ids_T: Tensor | None) -> MoEOutput:
        routes = tuple(gate(x_TD, ids_T) for gate in layer.gates)
        self.recording = Recording(routes, layer.all_results(x_TD))
        return Replayed(self.recording)(layer, x_TD, ids_T)


class Replayed:
    """Answers from a recording, under the layer's present table."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def __call__(self, layer: MoE, x_TD: Tensor, ids_T: Tensor | None) -> MoEOutput:
        table, results_TEF = layer.slot_map, self._recording.results_TEF
        assert isinstance(table, SlotTable)
        maps = table.for_gates(table.hard_maps())
        routes = tuple(slot_map.apply(route) for slot_map, route in zip(maps, self._recording.routes, strict=True))
        pairs = Pairs.none(len(routes), results_TEF.shape[1], results_TEF.device)
        return MoEOutput(tuple(map(self._mixed, routes)), {}, routes, pairs, rows_computed=0)

    def _mixed(self, route: Route) -> Tensor:
        rows_NF = self._recording.results_TEF[route.token_N, route.slot_N]
        index = TokenIndex.of(route.token_N, route.num_tokens)
        weight_1N = route.weight_N.unsqueeze(0)
        return weighted_scatter(rows_NF, weight_1N, index)[0].to(rows_NF.dtype)


@contextmanager
def replaying(layers: Sequence[MoE], replays: Iterable[Replay]) -> Iterator[None]:
    """Let one of ``replays`` answer for each of ``layers`` within the context."""
    with ExitStack() as stack:
        for layer, replay in zip(layers, replays, strict=True):
            stack.enter_context(layer.replayed_by(replay))
        yield


class Capture:
    """Keeps what a layer is given and gives within :func:`capturing`, so that the gradient of its outputs can be asked.

    ``x_TD``: its tokens. ``routes``: of each gate, before the slot map (empty where the layer is replayed).
    ``added_GTF``: zeros that were added to each output, whose gradient is that of the output.
    """

    def __init__(self) -> None:
        self.x_TD: Tensor | None = None
        self.routes: list[Route] = []
        self.added_GTF: tuple[Tensor, ...] = ()

    def see(self, _: MoE, inputs: tuple[Tensor, ...], output: MoEOutput) -> MoEOutput:
        """Keep the input, and return ``output`` with the zeros added; a layer's forward hook."""
        self.x_TD = inputs[0].detach()
        self.added_GTF = tuple(torch.zeros_like(output_TF).requires_grad_() for output_TF in output.outputs)
        outputs = tuple(a_TF + b_TF for a_TF, b_TF in zip(output.outputs, self.added_GTF, strict=True))
        return replace(output, outputs=outputs)

    def see_route(self, _gate: object, _inputs: object, route: Route) -> None:
        """Keep a gate's route; a gate's forward hook."""
        self.routes.append(route)


@contextmanager
def capturing(layers: Sequence[MoE]) -> Iterator[list[Capture]]:
    """Yield a :class:`Capture` of each of ``layers``, which run once within the context."""
    captures = [Capture() for _ in layers]
    with ExitStack() as stack:
        for layer, capture in zip(layers, captures, strict=True):
            stack.callback(layer.register_forward_hook(capture.see).remove)
            for gate in layer.gates:
                stack.callback(gate.register_forward_hook(capture.see_route).remove)
        yield captures
