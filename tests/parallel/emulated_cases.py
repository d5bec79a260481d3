"""What ranks of any kind do in the tests of emulated worlds: a training, with results that can be sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet, Gate, TopK
from dist_moe.kernels import dropout
from dist_moe.layer import MoE
from dist_moe.parallel import World, experts_of_rank, sum_over_ranks
from dist_moe.search import PermutationSearch

DIM, HIDDEN, EXPERTS, STEPS = 6, 5, 8, 3
TOKENS = [5, 0, 9, 2]
"""Of the first ranks; all others have none."""


def train_on_rank(world: World, gate_name: str, skewed: bool) -> dict[str, Any]:
    """Steps of momentum SGD with dropout, gate noise, a global balance loss and a permutation that is learnt.

    Gives, as arrays, outputs, losses and all gradients of every step, and the parameters after the last.
    """
    torch.manual_seed(3)  # ranks are seeded alike, and draw different numbers of random numbers
    model = _build(world, gate_name, skewed)
    x_TD = torch.randn(sum(TOKENS), DIM, generator=torch.Generator().manual_seed(4)).split(TOKENS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    kept: dict[str, Tensor] = {}
    for step in range(STEPS):
        mine_TD = x_TD[world.rank].clone() if world.rank < len(TOKENS) else torch.zeros(0, DIM)
        output = _step(model, mine_TD.requires_grad_(), step)
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"x": mine_TD.grad}
        kept |= {f"{step} grad {name}": grad.clone() for name, grad in grads.items() if grad is not None}
        kept[f"{step} output"] = output
        _sum_dense_gradients(model, world)
        optimizer.step()
        optimizer.zero_grad()
    kept |= {f"final {name}": p for name, p in model.named_parameters()}
    kept |= {f"final {name}": b for name, b in model.named_buffers()}
    kept["random"] = torch.rand(3)
    return {name: tensor.detach().numpy() for name, tensor in kept.items()} | {"traffic": vars(world.traffic)}


def _build(world: World, gate_name: str, skewed: bool) -> MoE:
    gates: dict[str, Gate] = {
        "comet": Comet(DIM, EXPERTS, k=2, gamma=2.0, entropy_weight=0.1, balance_weight=0.1),
        "top_k": TopK(DIM, EXPERTS, k=2, noise=True, balance_weight=0.1),
    }
    gate = gates[gate_name]
    gate.sum_over_ranks = _sum_exactly
    if skewed:
        with torch.no_grad():
            for name, bias in gate.named_parameters():
                if name.endswith("bias"):
                    bias[..., 0] += 100.0
    search = PermutationSearch(EXPERTS, STEPS - 1, temperature=(0.1, 0.01), iterations=(3, 5), forward="hard")
    experts = DenseReLUBank(DIM, HIDDEN, EXPERTS, experts_of_rank(EXPERTS, world))
    return MoE(gate, experts, search, world).train()


def _step(model: MoE, x_TD: Tensor, step: int) -> Tensor:
    model.begin_step(step)
    out = model(dropout(x_TD, 0.3, training=True))
    output_TF = F.dropout(out.outputs[0], 0.2)
    (output_TF.square().sum() + sum(out.aux.values())).backward()
    model.end_step()
    return output_TF


def _sum_dense_gradients(model: nn.Module, world: World) -> None:
    """In rank order, as a backend's own sum may round otherwise."""
    for name, parameter in model.named_parameters():
        if not name.startswith("experts.") and parameter.grad is not None:
            parameter.grad = torch.stack(world.gather(parameter.grad)).sum(0)


def _sum_exactly(x: Tensor) -> Tensor:
    """A sum over ranks whose bits do not depend on the order: in multiples of 2^-20."""
    return sum_over_ranks((x * 2**20).round().to(torch.int64)).to(x.dtype) / 2**20
