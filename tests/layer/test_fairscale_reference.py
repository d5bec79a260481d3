"""FairScale's MOELayer with its Top2Gate, an implementation that is not ours, agrees with MoE and TopK."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe import MoE
from dist_moe.experts import DenseReLUBank
from dist_moe.gates import TopK

fairscale_moe = pytest.importorskip("fairscale.nn.moe")
DIM = EXPERTS = 4
TOKENS = 32


@pytest.fixture
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tokens_that_fill_every_expert_evenly() -> Tensor:
    """FairScale drops what exceeds 2 T / E rows per expert; here token t wants experts t and t + 1."""
    first = torch.arange(TOKENS) % EXPERTS
    x_TD = 0.1 * torch.rand(TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    x_TD[torch.arange(TOKENS), first] += 2.0
    x_TD[torch.arange(TOKENS), (first + 1) % EXPERTS] += 1.0
    return x_TD


@pytest.mark.usefixtures("_process_group")
def test_same_outputs_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fairscale.nn.moe.top2gate.gumbel_rsample", lambda shape, device: torch.zeros(shape, device=device)
    )
    torch.manual_seed(1)
    gate = TopK(DIM, EXPERTS, k=2)
    bank = DenseReLUBank(DIM, DIM, EXPERTS, range(EXPERTS))
    ours = MoE(gate, bank)
    their_gate = fairscale_moe.Top2Gate(DIM, EXPERTS)
    experts = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU()) for _ in range(EXPERTS))
    with torch.no_grad():
        gate.weight.copy_(torch.eye(DIM) + 0.01 * torch.randn(EXPERTS, DIM))
        their_gate.wg.weight.copy_(gate.weight)
        for e, expert in enumerate(experts):
            expert[0].weight.copy_(bank.weight[e].t())
            expert[0].bias.copy_(bank.bias[e])
    theirs = fairscale_moe.MOELayer(their_gate, experts)
    inputs = [tokens_that_fill_every_expert_evenly().requires_grad_() for _ in range(2)]

    output, reference = ours(inputs[0]).outputs[0], theirs(inputs[1].view(EXPERTS, -1, DIM)).view(TOKENS, DIM)
    torch.testing.assert_close(output, reference)
    for result in (output, reference):
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(gate.weight.grad, their_gate.wg.weight.grad)
    their_weight_grads = torch.stack([expert[0].weight.grad.t() for expert in experts])
    torch.testing.assert_close(bank.weight.grad, their_weight_grads)
