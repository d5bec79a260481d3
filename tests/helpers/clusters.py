"""Small mixtures trained on clustered data, each cluster with a linear map of its own: for table searches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet, DSelectK, Gate, HashRouting, TopK
from dist_moe.layer import MoE
from dist_moe.parallel import World, experts_of_rank
from dist_moe.search import SlotTable, give_branches_slots

WIDTH = 16
OUT = 8
IDS = 256


@dataclass(frozen=True)
class Tokens:
    """``x_TD`` inputs, ``y_TF`` targets, ``id_T`` ids that tell the cluster; ``total`` tokens over all batches."""

    x_TD: Tensor
    y_TF: Tensor
    id_T: Tensor
    total: int

    def part(self, of: slice) -> Tokens:
        return Tokens(self.x_TD[of], self.y_TF[of], self.id_T[of], self.total)


class Mixture(nn.Module):
    """One MoE layer and a linear head."""

    def __init__(self, gate: Gate, num_experts: int) -> None:
        super().__init__()
        self.moe = MoE(gate, DenseReLUBank(WIDTH, 2 * WIDTH, num_experts, range(num_experts)), SlotTable(num_experts))
        self.head = nn.Linear(2 * WIDTH, OUT)

    @property
    def table(self) -> Tensor:
        assert isinstance(self.moe.slot_map, SlotTable)
        return self.moe.slot_map.table

    def forward(self, x_TD: Tensor, id_T: Tensor) -> Tensor:
        return self.head(self.moe(x_TD, id_T).outputs[0])

    def loss(self, tokens: Tokens) -> Tensor:
        """This batch's share of the mean squared error."""
        error_TF = self(tokens.x_TD, tokens.id_T) - tokens.y_TF
        return error_TF.square().sum() / (tokens.total * OUT)


def make_gate(name: str, num_experts: int) -> Gate:
    if name == "comet":
        return Comet(WIDTH, num_experts, k=2, gamma=1.0, entropy_weight=0.05)
    if name == "top_k":
        return TopK(WIDTH, num_experts, k=2)
    if name == "dselect_k":
        return DSelectK(WIDTH, num_experts, k=2, gamma=1.0)
    assert name == "hash"
    return HashRouting(WIDTH, num_experts, torch.ones(IDS, dtype=torch.int64), "balanced")


def make_tokens(num_experts: int, count: int, seed: int) -> Tokens:
    """Two clusters per expert."""
    fixed = torch.Generator().manual_seed(num_experts)
    clusters = 2 * num_experts
    centre_CD = 2 * torch.randn(clusters, WIDTH, generator=fixed)
    map_CDF = torch.randn(clusters, WIDTH, OUT, generator=fixed) / 4
    drawn = torch.Generator().manual_seed(seed)
    cluster_T = torch.randint(clusters, (count,), generator=drawn)
    x_TD = centre_CD[cluster_T] + 0.5 * torch.randn(count, WIDTH, generator=drawn)
    id_T = (4 * cluster_T + torch.randint(4, (count,), generator=drawn)) % IDS
    return Tokens(x_TD, torch.einsum("td,tdf->tf", x_TD, map_CDF[cluster_T]), id_T, count)


@cache
def trained_state(name: str, num_experts: int, steps: int) -> dict[str, Tensor]:
    """The state of a mixture after some steps of Adam."""
    torch.manual_seed(0)
    model = Mixture(make_gate(name, num_experts), num_experts)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    tokens = make_tokens(num_experts, 8192, seed=1)
    for _ in range(steps):
        rows = torch.randint(tokens.total, (256,))
        output = model.moe(tokens.x_TD[rows], tokens.id_T[rows])
        loss = F.mse_loss(model.head(output.outputs[0]), tokens.y_TF[rows])
        optimizer.zero_grad()
        torch.stack([loss, *output.aux.values()]).sum().backward()
        optimizer.step()
    return model.state_dict()


def trained_mixture(name: str, num_experts: int, steps: int) -> Mixture:
    model = Mixture(make_gate(name, num_experts), num_experts)
    model.load_state_dict(trained_state(name, num_experts, steps))
    return model.eval()


def doubled(tokens: Tokens) -> Tokens:
    return replace(tokens, x_TD=tokens.x_TD.double(), y_TF=tokens.y_TF.double())


def bank_of_rank(bank: DenseReLUBank, world: World) -> DenseReLUBank:
    """This rank's part of the experts of ``bank``, which has them all."""
    ids = experts_of_rank(bank.num_experts, world)
    own = DenseReLUBank(bank.dim, bank.out_dim, bank.num_experts, ids).to(bank.weight.dtype)
    with torch.no_grad():
        own.weight.copy_(bank.weight[list(ids)])
        own.bias.copy_(bank.bias[list(ids)])
    return own


def two_gate_layer(slots: int, experts: int, per_gate: bool, branches: int) -> MoE:
    """A layer in fp64 of two COMET gates that have begun to harden, whose table has a row for each gate and branch."""
    torch.manual_seed(10)
    gates = [Comet(5, slots, k=2, gamma=0.1) for _ in range(2)]
    for gate in gates:
        nn.init.normal_(gate.split_weight)
    table = SlotTable(experts, num_gates=2, num_slots=slots, per_gate=per_gate, branches=branches)
    give_branches_slots(gates, table)
    return MoE(gates, DenseReLUBank(5, 3, experts, range(experts)), table).double()
