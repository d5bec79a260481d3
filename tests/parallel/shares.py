"""A layer split over the ranks of a world, and one step of a rank: for tests of exchanges."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dist_moe.parallel import World
from tests.helpers.oracle import gradients
from tests.layer.cases import Case, Layer, build_layer, build_tokens

Share = tuple[Layer, Tensor]


def shares_of(case: Case, tokens_per_rank: list[int], learning: bool = True) -> list[Share]:
    """Each rank's share of the layer, and its tokens."""
    case = replace(case, tokens=sum(tokens_per_rank))
    layer = build_layer(case)
    tokens = [x.requires_grad_(learning) for x in build_tokens(case).detach().split(tokens_per_rank)]
    return [(layer.of_rank(rank, len(tokens)), x) for rank, x in enumerate(tokens)]


def step(share: Share, world: World) -> tuple[dict[str, Tensor], int]:
    """All gradients and, as "out", the outputs; and the bytes that were sent."""
    layer, x_TD = share
    world.traffic.reset()
    outputs = torch.stack(layer.moe(world)(x_TD).outputs)
    loss = (outputs.square() * (1 + torch.arange(len(outputs))).view(-1, 1, 1)).sum()
    leaves = layer.leaves() | ({"x": x_TD} if x_TD.requires_grad else {})
    return gradients(loss, leaves) | {"out": outputs.detach()}, world.traffic.bytes
