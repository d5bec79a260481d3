"""Seats: routes of any number of experts per token in the tables of a fixed capacity that other MoE layers work with.

FairScale's and DeepSpeed's layers send every expert of every rank a table of C rows, as GShard does (Lepikhin et al.,
2020), filled or not. An assignment sits in the first free row of its expert, in the order of the tokens. With C the
number of tokens of the fullest expert on any rank nothing is lost but the padding's bytes and arithmetic. With a fixed
C the tokens that come too late are dropped for that expert: its weight is lost to them, the rest of their mixture
stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.gates import Gate
from dist_moe.parallel.wrappers import device_of
from dist_moe.routing import Route


@dataclass(frozen=True)
class Seats:
    """A route whose assignments all have a seat, ``seat_N`` in 0..capacity - 1, and what was wanted before.

    ``wanted_E``: (E,) int64, how many tokens each expert would have got.
    """

    route: Route
    seat_N: Tensor
    capacity: int
    wanted_E: Tensor


def seated(route: Route, capacity: int) -> Seats:
    """Return ``route`` without the assignments for which an expert's first ``capacity`` rows do not suffice."""
    wanted_E = route.tokens_per_slot
    order_N = route.slot_N.argsort(stable=True)  # by expert; of one expert in the order of the tokens
    first_E = wanted_E.cumsum(0) - wanted_E
    place_N = torch.arange(route.num_assignments, device=order_N.device)
    seat_N = torch.empty_like(order_N).index_put((order_N,), place_N - first_E[route.slot_N[order_N]])
    kept_N = seat_N < capacity
    return Seats(route.keep(kept_N), seat_N[kept_N], capacity, wanted_E)


class SeatingGate(nn.Module):
    """``gate`` of ours for a layer that is not ours: what the adapters for each kind of layer have in common.

    ``capacity_factor``: None gives every expert as many rows as the fullest needs on any rank of ``group``, by a small
    collective for which the host waits; a number gives ceil(capacity_factor * k * tokens / experts) rows, with the
    gate's own k, 1 for a gate without: every rank must then have equally many tokens.
    ``group``: the ranks over which the layer splits its experts; None is this rank alone.

    The layer calls the gate with tokens only. A gate that needs ids (hash routing) is not for it, slot maps and
    searches for them are not used, and whoever trains calls ``gate.begin_step`` and ``gate.end_step`` of gates that
    have a schedule or a feedback loop. Auxiliary losses are those of this rank's tokens, unless ``gate.sum_over_ranks``
    is set.
    """

    def __init__(
        self, gate: Gate, capacity_factor: float | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor must be a number above 0, or None to drop nothing, got {capacity_factor}"
            )
        self.gate = gate
        self.capacity_factor = capacity_factor
        self.group = group

    def seats(self, route: Route) -> Seats:
        """Return the seats of ``route`` in tables of the capacity that all ranks have. Collective over ``group``."""
        return seated(route, self._capacity(route))

    def aux(self, route: Route, x_TD: Tensor) -> Tensor:
        """Return the sum of the gate's auxiliary losses, 0 where it has none: the layer's ``l_aux``."""
        return sum(route.aux.values(), start=x_TD.new_zeros((), dtype=route.weight_N.dtype))

    def _capacity(self, route: Route) -> int:
        if self.capacity_factor is not None:
            k = getattr(self.gate, "k", 1)
            return max(1, math.ceil(self.capacity_factor * k * route.num_tokens / route.num_slots))
        fullest = route.tokens_per_slot.max()
        if self.group is not None and dist.get_world_size(self.group) > 1:
            fullest = fullest.to(device_of(self.group))
            dist.all_reduce(fullest, dist.ReduceOp.MAX, group=self.group)
        return max(1, int(fullest))
