"""Our gates inside DeepSpeed's own layer, ``deepspeed.moe.layer.MoE``.

    layer = deepspeed.moe.layer.MoE(256, expert, num_experts=16, ep_size=2)
    use_gate(layer, dist_moe.gates.Comet(dim=256, num_experts=16, k=2))

What the host costs: an all-to-all of rows padded to the capacity, (widest, tokens) lists of routes where ``widest`` is
the largest number of experts of any token, and experts in a Python loop. What is kept: any number of experts per
token, the gate's weights as they are, its auxiliary losses as ``l_aux``. The layer's own options k, capacity, noise and
drop_tokens are those of the gate that was replaced, and have no effect.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.gates import Gate
from dist_moe.integrations.seats import SeatingGate


class DeepSpeedGate(SeatingGate):
    """``DeepSpeedGate(gate, capacity_factor=None, group=None)``, in the place of a ``TopKGate``.

    Tokens that find no row of an expert free, where ``capacity_factor`` is a number, are dropped for that expert in
    the order of the tokens; their other weights stay as they are. ``group`` is set by DeepSpeed when its engine is
    built. Options: see :class:`SeatingGate`.
    """

    wall_clock_breakdown = False

    def forward(
        self, x_TD: Tensor, used_token: Tensor | None = None, sparse_routes: bool = True, use_tutel: bool = False
    ) -> tuple[Tensor, int, int, Tensor, Tensor, Tensor, Tensor]:
        """Return l_aux, capacity, number of experts, then by (widest, T): experts or -1, rows, weights; wanted (E,).

        ``used_token``: (T,), 0 where a token is to be sent nowhere; auxiliary losses count it all the same. Raises
        ValueError for Tutel's dispatch and for dense routes, which DeepSpeed's layer has no use for.
        """
        if use_tutel or not sparse_routes:
            raise ValueError("our gates give DeepSpeed's layer lists of routes: build it with use_tutel=False")
        route = self.gate(x_TD)
        if used_token is not None:
            route = route.keep(used_token[route.token_N] > 0)
        seats = self.seats(route)
        kept = seats.route
        count_T = torch.bincount(kept.token_N, minlength=kept.num_tokens)
        first_T = count_T.cumsum(0) - count_T
        place_N = torch.arange(kept.num_assignments, device=count_T.device) - first_T[kept.token_N]
        shape = (max(1, int(count_T.max()) if len(count_T) else 0), kept.num_tokens)
        expert_KT = torch.full(shape, -1, dtype=torch.int32, device=x_TD.device)
        expert_KT[place_N, kept.token_N] = kept.slot_N.int()
        row_KT = torch.zeros(shape, dtype=torch.int32, device=x_TD.device)
        row_KT[place_N, kept.token_N] = seats.seat_N.int()
        weight_KT = kept.weight_N.new_zeros(shape).index_put((place_N, kept.token_N), kept.weight_N)
        aux = self.aux(route, x_TD)
        return aux, seats.capacity, kept.num_slots, expert_KT, row_KT, weight_KT, seats.wanted_E

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        self.group = group


def use_gate(layer: Any, gate: Gate, capacity_factor: float | None = None) -> DeepSpeedGate:
    """Put ``gate`` in the place of the gate of a ``deepspeed.moe.layer.MoE``; return it as the layer has it now.

    Before ``deepspeed.initialize``. ``capacity_factor``: None drops nothing, see :class:`SeatingGate`. Raises
    ValueError where their numbers of experts differ.
    """
    if gate.num_slots != layer.num_experts:
        raise ValueError(f"a gate over {gate.num_slots} slots does not fit a layer of {layer.num_experts} experts")
    host = layer.deepspeed_moe
    host.gate = DeepSpeedGate(gate, capacity_factor, host.ep_group)
    return host.gate
