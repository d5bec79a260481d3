"""ReLU routing beyond its route and loss, which the oracle has: the loss's weight follows the number of experts."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from dist_moe.gates import ReLU
from dist_moe.parallel import EmulatedWorld, World, sum_over_ranks
from tests.gates.cases import DIM, tokens


def relu(k: int = 2, n: int = 6, l1_weight: float = 1e-8) -> ReLU:
    torch.manual_seed(0)
    return ReLU(DIM, n, k, l1_weight=l1_weight).double()


def test_the_weight_grows_by_a_fifth_while_tokens_have_more_experts_than_k_and_falls_back_below() -> None:
    gate, x_TD = relu(k=2), tokens(40).detach()
    weights = []
    for sign in (1.0, 1.0, 1.0, -1.0, -1.0, 0.0):  # all experts for every token, none; at last no token
        with torch.no_grad():
            gate.weight.fill_(sign)
        gate(x_TD.abs() if sign else x_TD[:0])
        gate.end_step()
        weights.append(float(gate.l1_weight))
    assert weights == pytest.approx([1e-8 * 1.2**steps for steps in (1, 2, 3, 2, 1, 1)])


def test_exactly_k_experts_per_token_leave_the_weight_alone() -> None:
    gate = relu(k=3)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([1.0, -1, 1, -1, -1, 1]).double().unsqueeze(1).expand(6, DIM))
    assert gate(tokens(9).detach().abs()).num_assignments == 27
    gate.end_step()
    assert int(gate.l1_steps) == 0


def test_the_weight_stays_between_its_first_value_and_1e4() -> None:
    """Also where nothing that it does can change the gate, for as long as that may be."""
    gate, x_TD = relu(k=1, l1_weight=1e-3), tokens(5).detach().abs()
    for sign, expected in ((1.0, 1e4), (-1.0, 1e-3)):
        with torch.no_grad():
            gate.weight.fill_(sign)
        for _ in range(100):
            gate(x_TD)
            gate.end_step()
        assert float(gate.l1_weight) == pytest.approx(expected)
    with torch.no_grad():
        gate.weight.fill_(1.0)
    gate(x_TD)
    gate.end_step()
    assert float(gate.l1_weight) == pytest.approx(1.2e-3), "it comes back at once"


def test_evaluation_counts_nothing() -> None:
    gate = relu(k=1).eval()
    with torch.no_grad():
        gate.weight.fill_(1.0)
    assert gate(tokens(5).abs()).aux == {}
    gate.end_step()
    assert int(gate.l1_steps) == 0


def test_every_rank_follows_the_experts_of_all_ranks() -> None:
    """The first rank's tokens alone would have the weight fall, or stay."""
    gate = relu(k=2)
    with torch.no_grad():
        gate.weight.fill_(1.0)
    gates, parts = [deepcopy(gate) for _ in range(3)], (-tokens(2).detach().abs(), tokens(0), tokens(9).detach().abs())

    def on_rank(world: World) -> int:
        own = gates[world.rank]
        own.sum_over_ranks = sum_over_ranks
        own(parts[world.rank])
        own.end_step()
        return int(own.l1_steps)

    assert EmulatedWorld(3).run(on_rank) == [1] * 3


@pytest.mark.parametrize("adapts", [False, True])
def test_training_leads_to_k_experts_per_token_on_average(adapts: bool) -> None:
    """A mixture of eight vectors that shall be a linear map, of which more experts would make a better one."""
    torch.manual_seed(1)
    x_TD, steps = torch.randn(256, 8) + 0.5, 1500
    target_TF, expert_EF = x_TD @ torch.randn(8, 4), torch.randn(8, 4)
    gate, assignments = ReLU(8, 8, 2), 0
    optimizer = torch.optim.Adam(gate.parameters(), lr=3e-3)
    for step in range(steps):
        route = gate(x_TD)
        loss = (route.dense() @ expert_EF - target_TF).square().mean() + route.aux["l1"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if adapts:
            gate.end_step()
        assignments += route.num_assignments * (step >= 500)
    per_token = assignments / (steps - 500) / len(x_TD)
    assert (1.6 < per_token < 2.4) == adapts


def test_the_state_is_in_the_checkpoint_and_survives_bf16() -> None:
    gate, fresh = relu(), relu().bfloat16()
    gate.l1_steps.fill_(37)
    fresh.load_state_dict(gate.state_dict())
    assert float(fresh.l1_weight) == pytest.approx(1e-8 * 1.2**37)
