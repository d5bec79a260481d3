"""What surrounds the forward pass: all experts on all tokens, steps that begin and end, and a replay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import SMoEDropout, TopK
from dist_moe.layer import MoE, MoEOutput
from dist_moe.parallel import EmulatedWorld, World
from tests.helpers.oracle import assert_same
from tests.layer.cases import Case, build_layer, build_tokens


def naive_results(bank: DenseReLUBank, x_TD: Tensor) -> Tensor:
    """(T, E, F), a token and an expert at a time."""
    results_TEF = x_TD.new_zeros(len(x_TD), bank.num_experts, bank.out_dim)
    for t, x_D in enumerate(x_TD):
        for e in range(bank.num_experts):
            results_TEF[t, e] = (x_D @ bank.weight[e] + bank.bias[e]).clamp(min=0)
    return results_TEF


@pytest.mark.parametrize("tokens_per_rank", [[4], [0], [3, 2], [0, 4], [2, 0, 1, 3]])
def test_all_results_are_those_of_every_expert_on_the_tokens_of_this_rank(tokens_per_rank: list[int]) -> None:
    case = Case(tokens=sum(tokens_per_rank))
    layer, num_ranks = build_layer(case), len(tokens_per_rank)
    tokens = build_tokens(case).detach().split(tokens_per_rank)
    shares = [layer.of_rank(rank, num_ranks) for rank in range(num_ranks)]

    def results(world: World) -> Tensor:
        return shares[world.rank].moe(world).all_results(tokens[world.rank]).detach()

    for rank, results_TEF in enumerate(EmulatedWorld(num_ranks).run(results)):
        assert results_TEF.shape == (tokens_per_rank[rank], case.num_experts, case.hidden)
        assert_same(results_TEF, naive_results(layer.experts, tokens[rank]).detach(), 1e-12)


def test_every_gate_is_told_of_the_step() -> None:
    gates = [SMoEDropout(3, 4, 1, 4, schedule_steps=3) for _ in range(2)]
    moe = MoE(gates, DenseReLUBank(3, 2, 4, range(4)))
    for step in range(4):
        moe.begin_step(step)
        routes = moe(torch.randn(5, 3)).routes
        assert [route.num_assignments for route in routes] == [5 * (step + 1)] * 2


def test_every_gate_is_told_of_the_end_of_a_step() -> None:
    gates = [TopK(3, 4, k=1, bias_update_rate=0.5) for _ in range(2)]
    moe = MoE(gates, DenseReLUBank(3, 2, 4, range(4))).train()
    with torch.no_grad():
        for expert, gate in enumerate(gates):
            gate.bias[expert] = 100.0
    moe(torch.randn(8, 3))
    moe.end_step()
    assert gates[0].bias_steps.tolist() == [-1, 1, 1, 1]
    assert gates[1].bias_steps.tolist() == [1, -1, 1, 1]
    moe.end_step()  # nothing was routed since
    assert gates[0].bias_steps.tolist() == [-1, 1, 1, 1]


def test_a_replay_answers_instead_of_the_layer() -> None:
    case = Case()
    layer, x_TD, ids_T = build_layer(case), build_tokens(case), torch.arange(case.tokens)
    moe = layer.moe()
    answer, asked = moe(x_TD), []

    def replay(asking: MoE, x: Tensor, ids: Tensor | None) -> MoEOutput:
        asked.append((asking, x, ids))
        return answer

    with torch.no_grad():
        layer.experts.weight.fill_(torch.nan)
    with moe.replayed_by(replay):
        assert moe(x_TD, ids_T) is answer
    assert asked == [(moe, x_TD, ids_T)]
    assert moe(x_TD).outputs[0].isnan().any()
