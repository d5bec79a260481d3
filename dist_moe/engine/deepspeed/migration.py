"""Migration: experts change their ranks, with fp32 masters and optimizer state, bit for bit.

    rank 0: e0 e1 e2   --e1-->   rank 0: e0 e4 e2      row i of every parameter of a bank, and of its master and
    rank 1: e3 e4 e5   <--e4--   rank 1: e3 e1 e5      moments, is that of the i-th expert of ``expert_ids``

Only experts whose rank changes travel, within their expert-parallel group, one state of one parameter at
a time: a rank holds, beside what the engine holds, that state of its experts of that parameter twice,
and the rows that leave and arrive. Every row travels with a checksum of its bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.deepspeed.parameter_state import read_state, state_keys, write_state
from dist_moe.engine.deepspeed.sharded_parameters import gather_kept, whole_shape
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.layer import MoE
from dist_moe.parallel import Placement, World, gather_objects

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Migration:
    """A move that was made. ``experts``: those that changed their rank. ``bytes``: sent by all ranks together."""

    experts: tuple[int, ...]
    bytes: int


def state_bytes_per_expert(engine: ExpertParallelEngine, layer: MoE) -> int:
    """Return the bytes that travel with one expert: masters and optimizer states of its parameters, in fp32."""
    moments = len(state_keys(engine)) - 1
    numbers = sum(
        whole_shape(parameter)[1:].numel() * (1 + moments * parameter.requires_grad)
        for parameter in layer.experts.parameters()
    )
    return numbers * torch.finfo(torch.float32).bits // 8


@torch.no_grad()
def migrate(engine: ExpertParallelEngine, layer: MoE, placement: Placement) -> Migration:
    """Move the experts of ``layer``, a layer of the engine's module, to where ``placement`` says.

    Between two training steps. Collective over all ranks; nothing is sent where nothing changes. Raises, on
    every rank: RuntimeError if the ranks were given different placements, or had different ones before, or
    if a row did not arrive as it was sent; ValueError if the placement does not fit the layer.
    """
    digests = gather_objects(f"{layer.placement.digest} {placement.digest}")
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise RuntimeError(f"the placement before or after the move of ranks {differing} differs from that of rank 0")
    if placement == layer.placement:
        return Migration((), 0)
    ACTIVITY.enter("migration")
    moves = _Moves.between(layer.placement, placement, layer.world.rank)
    keys, altered, sent = state_keys(engine), [], 0
    for name, parameter in layer.experts.named_parameters():
        for key in keys if parameter.requires_grad else keys[:1]:  # the master alone of one that is held still
            state, arrived_well = moves.carry(read_state(engine, parameter, key), layer.world)
            write_state(engine, parameter, key, state)
            sent += len(moves.leaving) * state[0].numel() * state.element_size()
            if not arrived_well:
                altered.append(f"{name}|{key}")
    if engine.shards_parameters:
        gather_kept(engine)  # slices were written, and whole copies of small parameters are older than they are
    experts = layer.placement.moved_to(placement)
    layer.place(placement)
    results = gather_objects((altered, sent))
    if broken := [f"rank {rank}: {', '.join(bad)}" for rank, (bad, _) in enumerate(results) if bad]:
        raise RuntimeError(f"experts did not arrive as they were sent ({'; '.join(broken)})")
    return Migration(experts, sum(sent for _, sent in results))


@dataclass(frozen=True)
class _Moves:
    """One rank's part of a move.

    ``stay``: (place before, place after) of its experts that stay. ``leaving``: places before, in the order of the
    ranks to which they go, ``send_rows`` to each. ``arriving``: places after, in the order of the ranks from which they
    come, ``receive_rows`` from each.
    """

    stay: tuple[tuple[int, int], ...]
    leaving: list[int]
    send_rows: list[int]
    arriving: list[int]
    receive_rows: list[int]

    @classmethod
    def between(cls, old: Placement, new: Placement, rank: int) -> _Moves:
        """Return the part of ``rank`` in a move from ``old`` to ``new``."""
        mine, future = old.experts_of(rank), new.experts_of(rank)
        to_rank = [sorted(set(mine) & set(new.experts_of(r)) if r != rank else ()) for r in range(old.num_ranks)]
        from_rank = [sorted(set(future) & set(old.experts_of(r)) if r != rank else ()) for r in range(old.num_ranks)]
        return cls(
            stay=tuple((mine.index(e), future.index(e)) for e in mine if e in future),
            leaving=[mine.index(e) for experts in to_rank for e in experts],
            send_rows=[len(experts) for experts in to_rank],
            arriving=[future.index(e) for experts in from_rank for e in experts],
            receive_rows=[len(experts) for experts in from_rank],
        )

    def carry(self, state: Tensor, world: World) -> tuple[Tensor, bool]:
        """Return (E_local, ...) after the move, and whether all rows arrived as they were sent."""
        rows = state[self.leaving].flatten(1)
        received = world.exchange(rows, self.send_rows, self.receive_rows)
        sums = world.exchange(_checksums(rows), self.send_rows, self.receive_rows)
        moved = torch.empty_like(state)
        for before, after in self.stay:
            moved[after] = state[before]
        moved[self.arriving] = received.view(-1, *state.shape[1:])
        return moved, torch.equal(_checksums(received), sums)


def _checksums(rows: Tensor) -> Tensor:
    """Return (N, 1) int64: for every row of (N, numbers) the sum of its bits, with a weight for each place.

    Weights are odd, so that no bit vanishes modulo 2^64, and differ, so that exchanged numbers are noticed. One row at
    a time: the widened bits of all rows would take twice their memory.
    """
    sums = torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
    weights = 2 * torch.arange(rows.shape[1], device=rows.device) + 1
    for index, row in enumerate(rows):
        sums[index] = (row.contiguous().view(_INTEGER_OF_SIZE[row.element_size()]).long() * weights).sum()
    return sums
