"""Scores of slot -> expert tables: the loss after a move, and the gradient of the loss with respect to the tables.

For a layer with mixtures g and experts f the output of a token is y = sum_s g_s sum_e P[s, e] f_e(x), with P the matrix
of the table. So the gradient of the loss L at the table is a sum over tokens,

    D[s, e] = dL/dP[s, e] = sum_t g_ts <dL/dy_t, f_e(x_t)>

and estimates to first order what another table gains. Two ways to score: :class:`RecordedScores` keeps what every
expert makes of every token, so that a candidate costs next to nothing; :class:`StreamedScores` keeps none of it and
runs the model for each candidate. Each rank scores its own batches; losses and gradients are summed over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.layer import MoE
from dist_moe.parallel import max_over_ranks, sum_over_ranks
from dist_moe.routing import Route
from dist_moe.search.agreement import assert_same_on_all_ranks, take_from_first_rank
from dist_moe.search.layers import is_held, moe_layers, slot_tables
from dist_moe.search.moves import Move, apply
from dist_moe.search.replay import Recorder, Recording, Replayed, capturing, replaying

RESOLUTION = {torch.float32: 1e-6, torch.float64: 1e-11}
"""By the loss's precision, the share of the loss below which two candidates count as equal: the rounding of
sums, which depends on how many ranks share the examples, must not decide between experts that hardly matter."""

BatchLoss = Callable[[Any], Tensor]
"""A batch -> this batch's share of the loss; the shares of all batches and ranks add up to the loss."""

_UNUSED = "an MoE layer with a table takes no part in the loss: there is nothing to search"


class TableScores(ABC):
    """Scores the tables of ``model`` on ``batches``. Every method is collective over all ranks.

    ``model``: any module with one or several MoE layers whose slot map is a ``SlotTable``, and which run in the order
    in which they were registered, once each. Tables that are held still are left alone. ``batches``: this rank's; every
    rank has as many (they may be empty). ``loss``: see ``BatchLoss``; it runs ``model``. ``tables``: the (P, K, S)
    tables to search, one per layer. ``resolution``: share of the loss that rounding decides, of its precision.

    Raises ValueError if the model has no such layer, or one that the loss does not need.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], loss: BatchLoss) -> None:
        tables = {name: table for name, table in slot_tables(model).items() if not is_held(table)}
        if not tables:
            raise ValueError("the model has no MoE layer with a slot -> expert table to search")
        self._model, self._batches, self._loss = model, batches, loss
        self._slot_tables = list(tables.values())
        self._layers = [moe_layers(model)[name] for name in tables]
        self.tables: list[Tensor] = [table.table for table in self._slot_tables]
        self.resolution = RESOLUTION[torch.float32]

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Keep the model in evaluation mode within; at the end every rank proves that it has the same tables."""
        was_training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(was_training)
        for table in self.tables:
            assert_same_on_all_ranks(table)

    def take(self, move: Move) -> None:
        """Do ``move`` for good."""
        apply(move, self.tables)

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """Return D of each layer, (P, K, S, E) in fp64, at the present tables, summed over batches and ranks."""
        totals = [table.matrix_of(table.table, torch.float64).zero_() for table in self._slot_tables]
        for number in range(len(self._batches)):
            self._add_gradients(number, totals)
        return [sum_over_ranks(total) for total in totals]

    @torch.no_grad()
    def losses(self, moves: Sequence[Move]) -> list[float]:
        """Return the loss over all batches and ranks after each of ``moves`` alone; the same on every rank."""
        totals = torch.zeros(len(moves), dtype=torch.float64, device=self.tables[0].device)
        for number in range(len(self._batches)):
            for i, move in enumerate(moves):
                apply(move, self.tables)
                try:
                    loss = self._batch_loss(number, move)
                finally:
                    apply(reversed(move), self.tables)
                self.resolution = RESOLUTION.get(loss.dtype, RESOLUTION[torch.float32])
                totals[i] += loss.double()
        return take_from_first_rank(sum_over_ranks(totals)).tolist()

    @abstractmethod
    def _add_gradients(self, number: int, totals: list[Tensor]) -> None:
        """Add the gradients of batch ``number`` to ``totals``."""

    @abstractmethod
    def _batch_loss(self, number: int, move: Move) -> Tensor:
        """Return the loss of batch ``number``; ``move`` has been done to the tables just before."""


def add_gradient(
    total_PKSE: Tensor, routes: Sequence[Route], grads_GTF: Sequence[Tensor], results_TEF: Tensor, first: int = 0
) -> None:
    """Add to ``total_PKSE`` the D of the tokens ``first`` and after, whose experts' results are ``results_TEF``.

    ``routes``, ``grads_GTF``: of each gate, for all tokens: before the slot map, and dL/dy.
    """
    tables, branches, num_slots, _ = total_PKSE.shape
    chunk = slice(first, first + len(results_TEF))
    for gate, (route, grad_TF) in enumerate(zip(routes, grads_GTF, strict=True)):
        slope_TE = torch.einsum("tef,tf->te", results_TEF, grad_TF[chunk].to(results_TEF.dtype)).double()
        weight_TKS = route.dense()[chunk].view(-1, branches, num_slots).double()
        total_PKSE[gate if tables > 1 else 0] += torch.einsum("tks,te->kse", weight_TKS, slope_TE)


class RecordedScores(TableScores):
    """Runs every expert on every token once and keeps the results: bytes of tokens x experts x width, per layer.

    A move in a layer below the last one changes what later layers see; then all are run again.
    """

    _recordings: list[list[Recording]]

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Keep the recordings within, too."""
        with super().searching():
            self._record()
            try:
                yield
            finally:
                self._recordings = []

    def take(self, move: Move) -> None:
        """Do ``move`` for good."""
        super().take(move)
        if min(swap.layer for swap in move) + 1 < len(self._layers):
            self._record()

    @torch.no_grad()
    def _record(self) -> None:
        """Run every batch under the present tables, and keep what gates and experts of each layer gave."""
        self._recordings = []
        for batch in self._batches:
            recorders = [Recorder() for _ in self._layers]
            with replaying(self._layers, recorders):
                self._loss(batch)
            self._recordings.append([r.recording for r in recorders if r.recording is not None])
            if len(self._recordings[-1]) < len(self._layers):
                raise ValueError(_UNUSED)

    def _add_gradients(self, number: int, totals: list[Tensor]) -> None:
        recordings = self._recordings[number]
        for layer, total in enumerate(totals):
            replays = map(Replayed, recordings[: layer + 1])
            captured = capturing(self._layers[layer : layer + 1])
            with torch.enable_grad(), replaying(self._layers[: layer + 1], replays), captured as (capture,):
                loss = self._loss(self._batches[number])
            grads_GTF = torch.autograd.grad(loss, capture.added_GTF)
            add_gradient(total, recordings[layer].routes, grads_GTF, recordings[layer].results_TEF)

    def _batch_loss(self, number: int, move: Move) -> Tensor:
        replayed = min((swap.layer for swap in move), default=len(self._layers) - 1) + 1
        with replaying(self._layers[:replayed], map(Replayed, self._recordings[number][:replayed])):
            return self._loss(self._batches[number])


class StreamedScores(TableScores):
    """Runs the model as it is for each candidate, and all experts on a chunk of tokens at a time for the gradient.

    ``chunk_bytes``: that all experts' results for a chunk of tokens take on a rank, see :func:`chunk_tokens`.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], loss: BatchLoss, chunk_bytes: int) -> None:
        super().__init__(model, batches, loss)
        self._chunk_bytes = chunk_bytes

    def _add_gradients(self, number: int, totals: list[Tensor]) -> None:
        with torch.enable_grad(), capturing(self._layers) as captures:
            loss = self._loss(self._batches[number])
        if any(capture.x_TD is None for capture in captures):
            raise ValueError(_UNUSED)
        grads = torch.autograd.grad(loss, [added for capture in captures for added in capture.added_GTF])
        for layer, capture, total in zip(self._layers, captures, totals, strict=True):
            of_layer, grads = grads[: len(layer.gates)], grads[len(layer.gates) :]
            assert capture.x_TD is not None
            for first, results_TEF in self._results(layer, capture.x_TD):
                add_gradient(total, capture.routes, of_layer, results_TEF, first)

    def _results(self, layer: MoE, x_TD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of the first token of each chunk, and the (T, E, F) results of all experts on the chunk.

        The ranks that share the experts compute them together: all have as many chunks, perhaps empty ones.
        """
        size = chunk_tokens(layer, self._chunk_bytes, x_TD.element_size())
        chunks = max_over_ranks(torch.tensor([-(-len(x_TD) // size)], device=x_TD.device))
        for first in range(0, int(chunks) * size, size):
            yield first, layer.all_results(x_TD[first : first + size])

    def _batch_loss(self, number: int, move: Move) -> Tensor:
        return self._loss(self._batches[number])


def recorded_bytes(layers: Sequence[MoE], tokens: float) -> int:
    """Return what :class:`RecordedScores` keep of ``tokens`` tokens of a rank in fp64: the results of all experts."""
    return round(tokens * sum(8 * layer.experts.num_experts * layer.experts.out_dim for layer in layers))


def streamed_bytes(layers: Sequence[MoE], tokens: float, chunk_bytes: int) -> int:
    """Return what :class:`StreamedScores` take for batches of ``tokens`` tokens of a rank in fp64, at most.

    A chunk of all experts' results, and of every layer its tokens, its gates' dense mixtures and the gradients of their
    outputs. Beside it there is what a forward and backward pass of the model keeps of a batch.
    """
    kept, chunk = 0.0, 0.0
    for layer in layers:
        mixtures = 2 * sum(gate.num_slots for gate in layer.each_gate)  # as the chunk's part is taken out of them
        kept += 8 * tokens * (layer.experts.dim + 2 * len(layer.gates) * layer.experts.out_dim + mixtures)
        of_token = bytes_per_token(layer, 8)
        chunk = max(chunk, of_token * min(tokens, chunk_tokens(layer, chunk_bytes, 8)))
    return round(kept + chunk)


def bytes_per_token(layer: MoE, value_bytes: int) -> int:
    """Return what a token takes while all experts of ``layer`` run on it: its rows, results, what is between."""
    bank = layer.experts
    return bank.num_experts * value_bytes * (2 * bank.dim + bank.kept_per_row + 3 * bank.out_dim)


def chunk_tokens(layer: MoE, chunk_bytes: int, value_bytes: int) -> int:
    """Return how many tokens' results of all experts fit into ``chunk_bytes``, at least 1."""
    return max(1, chunk_bytes // bytes_per_token(layer, value_bytes))
