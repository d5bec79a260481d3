"""Recorded layers: what gates and experts gave for a batch, replayed under other tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

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
    """Answers from a recording, under the layer's present table or under ``matrix_PKSE``, of which the
    answer is then a differentiable (linear) function."""

    def __init__(self, recording: Recording, matrix_PKSE: Tensor | None = None) -> None:
        self._recording = recording
        self._matrix_PKSE = matrix_PKSE

    def __call__(self, layer: MoE, x_TD: Tensor, ids_T: Tensor | None) -> MoEOutput:
        table = layer.slot_map
        assert isinstance(table, SlotTable)
        recorded = self._recording.routes
        if self._matrix_PKSE is None:
            maps = table.for_gates(table.hard_maps())
            routes = tuple(slot_map.apply(route) for slot_map, route in zip(maps, recorded, strict=True))
            return self._output(tuple(map(self._sparse, routes)), routes)
        of_gate = range(len(recorded)) if table.per_gate else [0] * len(recorded)
        outputs = [self._dense(route, self._matrix_PKSE[p]) for p, route in zip(of_gate, recorded, strict=True)]
        return self._output(tuple(outputs), recorded)

    def _sparse(self, route: Route) -> Tensor:
        rows_NF = self._recording.results_TEF[route.token_N, route.slot_N]
        index = TokenIndex.of(route.token_N, route.num_tokens)
        weight_1N = route.weight_N.unsqueeze(0)
        return weighted_scatter(rows_NF, weight_1N, index)[0].to(rows_NF.dtype)

    def _dense(self, route: Route, matrix_KSE: Tensor) -> Tensor:
        results_TEF = self._recording.results_TEF
        branches, num_slots, _ = matrix_KSE.shape
        weight_TKS = route.dense().view(-1, branches, num_slots)
        weight_TE = torch.einsum("tks,kse->te", weight_TKS.to(matrix_KSE.dtype), matrix_KSE)
        return torch.einsum("te,tef->tf", weight_TE.to(results_TEF.dtype), results_TEF)

    def _output(self, outputs: tuple[Tensor, ...], routes: tuple[Route, ...]) -> MoEOutput:
        results_TEF = self._recording.results_TEF
        pairs = Pairs.none(len(routes), results_TEF.shape[1], results_TEF.device)
        return MoEOutput(outputs, {}, routes, pairs, rows_computed=0)


@contextmanager
def replaying(layers: Sequence[MoE], replays: Iterable[Replay]) -> Iterator[None]:
    """Let one of ``replays`` answer for each of ``layers`` within the context."""
    with ExitStack() as stack:
        for layer, replay in zip(layers, replays, strict=True):
            stack.enter_context(layer.replayed_by(replay))
        yield
