"""Our gates inside FairScale's ``MOELayer``.

    gate = FairScaleGate(dist_moe.gates.Comet(dim=256, num_experts=16, k=2), group=group)
    layer = fairscale.nn.moe.MOELayer(gate, experts, group)

What the host costs: two tables of (tokens, experts, capacity), fp32 throughout, an all-to-all of padded rows. What is
kept: any number of experts per token, the gate's weights as they are, its auxiliary losses as ``layer.l_aux``.
FairScale comes with the extra ``fairscale``; the adapter itself does not import it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.integrations.seats import SeatingGate


class FairScaleGate(SeatingGate):
    """``FairScaleGate(gate, capacity_factor=None, group=None)``, in the place of a ``Top2Gate``.

    Tokens that find no row of an expert free, where ``capacity_factor`` is a number, are dropped for that expert in
    the order of the tokens; their other weights stay as they are. Options: see :class:`SeatingGate`.
    """

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return l_aux, the weights (T, E, C) by which results are combined, and the mask (T, E, C) of rows to send."""
        route = self.gate(x_TD)
        seats = self.seats(route)
        kept = seats.route
        shape = (route.num_tokens, route.num_slots, seats.capacity)
        places = (kept.token_N, kept.slot_N, seats.seat_N)
        combine_TEC = kept.weight_N.new_zeros(shape).index_put(places, kept.weight_N)
        mask_TEC = torch.zeros(shape, dtype=torch.bool, device=x_TD.device)
        mask_TEC[places] = True
        return self.aux(route, x_TD).to(x_TD.dtype), combine_TEC.to(x_TD.dtype), mask_TEC
