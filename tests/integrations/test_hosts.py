"""Our gates inside FairScale's and DeepSpeed's layers: values and gradients of our own layer, and what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe import MoE
from dist_moe.experts import DenseReLUBank
from dist_moe.gates import AdaMoEConfig, Comet, DSelectK, Gate, GateContext, Softmax, TopK
from dist_moe.integrations.deepspeed import import_deepspeed
from dist_moe.integrations.deepspeed_moe import DeepSpeedGate, use_gate
from dist_moe.integrations.fairscale import FairScaleGate
from dist_moe.integrations.seats import seated
from tests.helpers.pool import on_ranks
from tests.integrations.steps import plain_group

DIM, EXPERTS, TOKENS = 5, 4, 24
GATES: dict[str, Callable[[], Gate]] = {
    "comet": lambda: Comet(DIM, EXPERTS, k=2, gamma=0.5, entropy_weight=0.1),
    "dselect_k": lambda: DSelectK(DIM, EXPERTS, k=2, entropy_weight=0.1),
    "top_1": lambda: TopK(DIM, EXPERTS, k=1, scores="softmax_before", balance_weight=0.1),
    "top_3": lambda: TopK(DIM, EXPERTS, k=3, z_loss_weight=0.1),
    "softmax": lambda: Softmax(DIM, EXPERTS),
    "ada_moe": lambda: AdaMoEConfig().build(DIM, EXPERTS, GateContext()),
}


def gate_of(name: str) -> Gate:
    torch.manual_seed(7)
    gate = GATES[name]()
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.mul_(3.0)
    return gate


def tokens() -> Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def bank_of(experts: range = range(EXPERTS)) -> DenseReLUBank:
    torch.manual_seed(2)
    return DenseReLUBank(DIM, DIM, EXPERTS, experts)


def networks(bank: DenseReLUBank) -> list[nn.Sequential]:
    """The experts of ``bank``, one by one, as hosts want them."""
    found = [nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU()) for _ in bank.expert_ids]
    with torch.no_grad():
        for e, network in enumerate(found):
            network[0].weight.copy_(bank.weight[e].t())
            network[0].bias.copy_(bank.bias[e])
    return found


def fairscale_host(gate: Gate, bank: DenseReLUBank, factor: float | None, ranks: int) -> tuple[nn.Module, nn.Module]:
    import torch.distributed as dist

    moe = pytest.importorskip("fairscale.nn.moe")
    adapter = FairScaleGate(gate, factor, dist.group.WORLD)
    return moe.MOELayer(adapter, nn.ModuleList(networks(bank))), adapter


def deepspeed_host(gate: Gate, bank: DenseReLUBank, factor: float | None, ranks: int) -> tuple[nn.Module, nn.Module]:
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    host = deepspeed.moe.layer.MoE(DIM, nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU()), EXPERTS, ep_size=ranks)
    adapter = use_gate(host, gate, factor)
    host.set_deepspeed_parallelism()
    ours = host.deepspeed_moe.experts.deepspeed_experts
    for network, copied in zip(ours, networks(bank), strict=True):
        network.load_state_dict(copied.state_dict())
    return host, adapter


HOSTS = {"fairscale": fairscale_host, "deepspeed": deepspeed_host}
Numbers = dict[str, Tensor]


def cotangents(y_TD: Tensor) -> Tensor:
    return torch.linspace(-1, 1, TOKENS * DIM).view(TOKENS, DIM).to(y_TD)


def numbers_of_host(host: str, gate_name: str, factor: float | None = None) -> Numbers:
    """What a host gives for this rank's share of the tokens: values, auxiliary loss, all gradients, experts by id."""
    import torch.distributed as dist

    with plain_group():
        rank, ranks = dist.get_rank(), dist.get_world_size()
        local = EXPERTS // ranks
        gate, bank = gate_of(gate_name), bank_of(range(rank * local, (rank + 1) * local))
        layer, _ = HOSTS[host](gate, bank, factor, ranks)
        x_TD = tokens().chunk(ranks)[rank].clone().requires_grad_()
        if host == "fairscale":
            y_TD = layer(x_TD.view(local, -1, DIM)).view(-1, DIM)
            aux, experts = layer.l_aux, layer.experts
        else:
            y_TD, aux, counts = layer(x_TD)
            assert counts.tolist() == gate(x_TD).tokens_per_slot.tolist()
            experts = layer.deepspeed_moe.experts.deepspeed_experts
        ((y_TD * cotangents(y_TD).chunk(ranks)[rank]).sum() + aux).backward()
        result = {"y": y_TD.detach(), "aux": aux.detach(), "x": x_TD.grad}
        result |= {f"gate.{name}": p.grad for name, p in gate.named_parameters() if p.grad is not None}
        for e, expert in zip(bank.expert_ids, experts, strict=True):
            result |= {f"weight|{e}": expert[0].weight.grad.t(), f"bias|{e}": expert[0].bias.grad}
        return result


def numbers_of_ours(gate_name: str, ranks: int) -> Numbers:
    """The same of our layer on one process; auxiliary losses are those of each rank's share."""
    gate, bank = gate_of(gate_name), bank_of()
    layer, x_TD = MoE(gate, bank), tokens().requires_grad_()
    outs = [layer(share) for share in x_TD.chunk(ranks)]
    y_TD = torch.cat([out.outputs[0] for out in outs])
    auxes = [sum(out.aux.values(), start=torch.zeros(())) for out in outs]
    ((y_TD * cotangents(y_TD)).sum() + sum(auxes)).backward()
    result: dict[str, Any] = {"y": y_TD.detach(), "aux": torch.stack(auxes).detach(), "x": x_TD.grad}
    result |= {f"gate.{name}": p.grad for name, p in gate.named_parameters() if p.grad is not None}
    for e in range(EXPERTS):
        result |= {f"weight|{e}": bank.weight.grad[e], f"bias|{e}": bank.bias.grad[e]}  # type: ignore[index]
    return result


def of_all_ranks(by_rank: list[Numbers]) -> Numbers:
    """Tokens side by side, gradients of the gate added up, every expert once."""
    result = {name: value for numbers in by_rank for name, value in numbers.items() if "|" in name}
    result |= {name: torch.cat([numbers[name] for numbers in by_rank]) for name in ("y", "x")}
    result["aux"] = torch.stack([numbers["aux"] for numbers in by_rank])
    for name in by_rank[0]:
        if name.startswith("gate."):
            result[name] = torch.stack([numbers[name] for numbers in by_rank]).sum(0)
    return result


def assert_close(found: Numbers, wanted: Numbers) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("host", HOSTS)
def test_two_ranks_of_a_host_give_what_our_layer_gives(host: str, gate: str) -> None:
    assert_close(of_all_ranks(on_ranks(2, numbers_of_host, host, gate)), numbers_of_ours(gate, 2))


@pytest.mark.parametrize("gate", ["comet", "top_3"])
@pytest.mark.parametrize("host", HOSTS)
def test_what_is_dropped_is_what_comes_too_late(host: str, gate: str) -> None:
    """By a loop over tokens and experts: an expert takes the first ``capacity`` of a rank's tokens that want it."""
    factor = 0.5
    found = of_all_ranks(on_ranks(2, numbers_of_host, host, gate, factor))
    ours, bank, x_TD = gate_of(gate), bank_of(), tokens().requires_grad_()
    capacity = -(-int(factor * ours.k * TOKENS) // (2 * EXPERTS))
    rows, dropped = [], 0
    for share in x_TD.chunk(2):
        weight_TE, taken = ours(share).dense(), [0] * EXPERTS
        for t, x_D in enumerate(share):
            y_D = torch.zeros(DIM)
            for e in range(EXPERTS):
                if weight_TE[t, e] > 0 and taken[e] == capacity:
                    dropped += 1
                elif weight_TE[t, e] > 0:
                    taken[e] += 1
                    y_D = y_D + weight_TE[t, e] * (x_D @ bank.weight[e] + bank.bias[e]).clamp(min=0)
            rows.append(y_D)
    assert 0 < dropped < TOKENS * EXPERTS
    auxes = [sum(ours(share).aux.values(), start=torch.zeros(())) for share in x_TD.chunk(2)]
    y_TD = torch.stack(rows)
    ((y_TD * cotangents(y_TD)).sum() + sum(auxes)).backward()
    torch.testing.assert_close(found["y"], y_TD.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["x"], x_TD.grad, rtol=1e-5, atol=1e-6)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(found[f"gate.{name}"], parameter.grad, rtol=1e-5, atol=1e-6)
    assert bank.weight.grad is not None
    for e in range(EXPERTS):
        torch.testing.assert_close(found[f"weight|{e}"], bank.weight.grad[e], rtol=1e-5, atol=1e-6)


def test_seats_are_taken_in_the_order_of_tokens() -> None:
    route = TopK(DIM, EXPERTS, k=1, bias=False)(torch.zeros(5, DIM))  # ties: all five want expert 0
    seats = seated(route, 3)
    assert seats.route.token_N.tolist() == seats.seat_N.tolist() == [0, 1, 2]
    assert seats.wanted_E.tolist() == [5, 0, 0, 0]


@pytest.mark.parametrize("adapter", [FairScaleGate, DeepSpeedGate])
def test_no_token_and_no_expert_is_no_trouble(adapter: Any) -> None:
    for tokens_here in (0, 1):
        result = adapter(gate_of("comet"))(torch.zeros(tokens_here, DIM))
        assert int(result[2].sum() if adapter is FairScaleGate else (result[3] >= 0).sum()) >= tokens_here


def test_tokens_that_are_not_used_go_nowhere() -> None:
    gate = gate_of("comet")
    used_T = torch.arange(TOKENS) % 2
    _, _, _, expert_KT, _, weight_KT, wanted_E = DeepSpeedGate(gate)(tokens(), used_T)
    assert (expert_KT[:, used_T == 0] == -1).all()
    assert (weight_KT[:, used_T == 0] == 0).all()
    assert wanted_E.sum() == (expert_KT >= 0).sum()


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_capacities_that_are_none(factor: float) -> None:
    with pytest.raises(ValueError, match="capacity_factor"):
        FairScaleGate(gate_of("comet"), factor)
