"""Null slots (AdaMoE): dropped without a trace, renormalised, balanced as one bucket."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import AdaMoEConfig, Comet, Gate, GateContext, NullSlots, TopK
from dist_moe.gates.balance import load_balance
from dist_moe.gates.null_slots import without_null
from dist_moe.layer import MoE
from dist_moe.parallel import EmulatedWorld, World, experts_of_rank
from tests.gates.cases import VARIANTS, build, ids, tokens
from tests.helpers.oracle import assert_same


def ada_moe(n: int = 8, m: int = 16, k: int = 4, dim: int = 3, balance_weight: float = 1.0) -> NullSlots:
    torch.manual_seed(0)
    return NullSlots(TopK(dim, n + m, k).double(), m, balance_weight)


def prefer(gate: NullSlots, *slots: int) -> None:
    """Every token takes these slots, whatever it looks like."""
    assert isinstance(gate.gate, TopK)
    with torch.no_grad():
        gate.gate.weight.zero_()
        gate.gate.bias.fill_(-5.0)
        gate.gate.bias[list(slots)] = 5.0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "null" not in name and name != "top_k_noise"])
def test_check_f1_without_null_slots_it_is_the_gate_itself_to_the_bit(variant: str) -> None:
    gate, x_TD, ids_T = build(variant, 6, 2), tokens(7), ids(7)
    wrapped = NullSlots(gate, 0)
    wrapped.splits_branches = gate.splits_branches
    expected, route = gate.mixture(x_TD, ids_T), wrapped.mixture(x_TD, ids_T)
    assert torch.equal(route.weight_TKE, expected.weight_TKE)
    assert {name: x.item() for name, x in route.aux.items()} == {name: x.item() for name, x in expected.aux.items()}


def test_check_f2_weights_sum_to_one_or_there_are_none_and_gradients_are_finite() -> None:
    gate = ada_moe(n=4, m=8, k=2)
    x_TD = torch.randn(200, 3).double()
    bank = DenseReLUBank(3, 5, 4, range(4)).double()
    output = MoE(gate, bank)(x_TD)
    sums_T = output.routes[0].dense().sum(dim=1)
    null_only = sums_T == 0
    assert 0 < int(null_only.sum()) < 200
    assert_same(sums_T[~null_only], torch.ones_like(sums_T[~null_only]), 1e-15)
    assert not output.outputs[0][null_only].any()
    (output.outputs[0].square().sum() + output.aux["null_balance"]).backward()
    for parameter in gate.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


def test_check_f2_tokens_with_nulls_only_give_no_output_and_no_gradient_but_the_losss() -> None:
    gate, bank = ada_moe(n=4, m=4, k=2, balance_weight=0.0), DenseReLUBank(3, 5, 4, range(4)).double()
    prefer(gate, 5, 7)
    output = MoE(gate, bank)(torch.randn(6, 3).double())
    assert output.rows_computed == output.routes[0].num_assignments == 0
    assert not output.outputs[0].any()
    output.outputs[0].sum().backward()
    for parameter in gate.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_check_f3_which_null_slots_are_taken_does_not_change_the_loss() -> None:
    torch.manual_seed(0)
    n, m = 4, 6
    probability_TS = torch.randn(30, n + m).double().softmax(dim=1)
    selected_TS = torch.zeros(30, n + m, dtype=torch.bool).scatter(1, probability_TS.topk(3).indices, True)
    gate = ada_moe(n, m)
    expected = load_balance(gate, selected_TS, probability_TS, m)
    moved_TS = selected_TS.clone()
    for row_S in moved_TS:  # the same number of nulls a token, others of them
        count = int(row_S[n:].sum())
        row_S[n:] = torch.arange(m) < count
    assert not torch.equal(moved_TS, selected_TS)
    assert_same(load_balance(gate, moved_TS, probability_TS, m), expected, 1e-14)
    plain = [load_balance(gate, each_TS, probability_TS) for each_TS in (selected_TS, moved_TS)]
    assert abs(plain[0] - plain[1]) > 1e-3  # the loss without a bucket does tell them apart


def released_loss(slot_TK: Tensor, probability_TS: Tensor, n: int) -> Tensor:
    """The loss as released for Mixtral: the mean over the nulls is written into an axis that has no such rows."""
    share_KS = torch.nn.functional.one_hot(slot_TK, probability_TS.shape[1]).double().mean(dim=0)
    share_KS[n:] = share_KS[n:].mean()
    return probability_TS.shape[1] * (share_KS * probability_TS.mean(dim=0)).sum()


def test_check_f3_the_released_form_tells_null_slots_apart() -> None:
    """It is k times the loss without a bucket; ours has the bucket."""
    torch.manual_seed(0)
    n, m, k = 4, 6, 3
    probability_TS = torch.randn(30, n + m).double().softmax(dim=1)
    slot_TK = probability_TS.topk(k).indices
    renamed_TK = torch.where(slot_TK < n, slot_TK, n + (slot_TK - n + 1) % m)  # every null is another one
    released, moved = (released_loss(chosen_TK, probability_TS, n) for chosen_TK in (slot_TK, renamed_TK))
    assert abs(released - moved) > 1e-2
    gate, none_TS = ada_moe(n, m, k), torch.zeros(30, n + m, dtype=torch.bool)
    selected = [none_TS.scatter(1, chosen_TK, True) for chosen_TK in (slot_TK, renamed_TK)]
    plain = load_balance(gate, selected[0], probability_TS)
    assert released.item() == pytest.approx(k * plain.item(), rel=1e-12)
    ours, ours_moved = (load_balance(gate, selected_TS, probability_TS, m) for selected_TS in selected)
    assert ours_moved.item() == pytest.approx(ours.item(), rel=1e-12)
    assert abs(ours - plain) > 1e-2


@pytest.mark.parametrize(("n", "m", "k"), [(8, 16, 4), (4, 2, 3), (3, 0, 1)])
def test_check_f4_loss_is_one_for_uniform_routing_whatever_k(n: int, m: int, k: int) -> None:
    gate = ada_moe(n, m, k, dim=n + m)
    assert isinstance(gate.gate, TopK)
    with torch.no_grad():  # token t prefers slots t, t+1, ..., so that all slots are taken alike
        gate.gate.weight.copy_(sum(torch.eye(n + m).roll(shift, 1) for shift in range(k)))
    route = gate(torch.eye(n + m).double())
    assert route.num_assignments == n * k
    assert route.aux["null_balance"].item() == pytest.approx(1)


def test_check_f5_rows_and_bytes_are_those_of_the_experts_really_taken() -> None:
    rows, sent = {}, {}
    for m in (0, 8, 24):
        gate, x_TD = ada_moe(n=8, m=m, k=4), torch.randn(60, 3, generator=torch.Generator().manual_seed(1)).double()
        banks = [DenseReLUBank(3, 5, 8, range(4 * rank, 4 * rank + 4)).double() for rank in range(2)]
        slots = [gate(part).slot_N for part in x_TD.chunk(2)]
        away = sum(int((slot_N // 4 != rank).sum()) for rank, slot_N in enumerate(slots))

        def on_rank(world: World, gate: Gate = gate, banks: list = banks, x_TD: Tensor = x_TD) -> tuple[int, int, int]:
            assert tuple(experts_of_rank(8, world)) == banks[world.rank].expert_ids
            output = MoE(gate, banks[world.rank], world=world)(x_TD.chunk(2)[world.rank])
            return output.rows_computed, world.traffic.rows, world.traffic.bytes

        ranks = EmulatedWorld(2).run(on_rank)
        rows[m], sent[m] = sum(rank[0] for rank in ranks), sum(rank[2] for rank in ranks)
        assert rows[m] == sum(slot_N.numel() for slot_N in slots)
        assert sum(rank[1] for rank in ranks) == 2 * away  # there, and the results back
        assert sent[m] == away * (3 + 5) * 8
    assert rows[0] == 60 * 4 > rows[8] > rows[24]
    assert sent[0] > sent[8] > sent[24]


def test_check_f6_balance_brings_the_true_load_to_k_n_over_n_plus_m_without_making_it_constant() -> None:
    n, m, k = 4, 8, 3
    deviations = []
    for balance_weight in (0.0, 0.1, 1.0):
        gate = ada_moe(n, m, k, balance_weight=balance_weight)
        x_TD = torch.randn(300, 3, generator=torch.Generator().manual_seed(1)).double()
        assert isinstance(gate.gate, TopK)
        torch.nn.init.normal_(gate.gate.weight)
        with torch.no_grad():
            gate.gate.bias[:n] = 1.5  # at first nearly every selection is an expert
        optimizer = torch.optim.SGD(gate.parameters(), 0.5)
        target_TE = gate(x_TD).dense().detach()
        for _ in range(150):
            route = gate(x_TD)
            loss = (route.dense() - target_TE).square().sum(dim=1).mean() + sum(route.aux.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        load_T = torch.bincount(gate(x_TD).token_N, minlength=300).double()
        deviations.append(abs(load_T.mean().item() - k * n / (n + m)))
        assert load_T.var() > 0
    assert deviations[0] > 0.9 > 0.7 > deviations[1] > 0.1 > 0.05 > deviations[2]


def test_check_f7_a_tokens_route_does_not_depend_on_the_other_tokens() -> None:
    gate, x_TD = ada_moe(), torch.randn(9, 3).double()
    alone = torch.cat([gate(x_D.unsqueeze(0)).dense() for x_D in x_TD])
    assert_same(gate(x_TD).dense(), alone, 1e-14)


def test_dropped_weights_are_shared_out_in_proportion_and_untouched_rows_keep_their_bits() -> None:
    torch.manual_seed(0)
    weight_TKS = torch.rand(3, 2, 5)
    weight_TKS[0, :, 3:] = 0  # no null
    weight_TKS[1, :, :3] = 0  # nulls only
    weight_TKE = without_null(weight_TKS, 2)
    assert torch.equal(weight_TKE[0], weight_TKS[0, :, :3])
    assert not weight_TKE[1].any()
    assert_same(weight_TKE[2], weight_TKS[2, :, :3] / weight_TKS[2, :, :3].sum(), 1e-6)


def test_wraps_comet_with_its_branches_losses_and_hard_trees() -> None:
    inner = Comet(3, 8, 2, balance_weight=0.1).double()
    gate = NullSlots(inner, 3, balance_weight=0.5)
    assert (gate.num_experts, gate.num_branches, gate.num_slots) == (5, 2, 5)
    assert set(gate(torch.randn(4, 3).double()).aux) == {"entropy", "split_balance", "null_balance"}
    with torch.no_grad():
        inner.split_weight.zero_()
        inner.split_bias.copy_(torch.tensor([[9.0] * 7, [-9.0] * 7]))  # leaf 0 and leaf 7, a null
    route = gate(torch.randn(4, 3).double())
    assert route.slot_N.tolist() == [0] * 4
    assert_same(route.weight_N, torch.ones(4).double(), 1e-15)
    gate.splits_branches = True
    assert gate(torch.randn(4, 3).double()).num_slots == 10


def test_owner_speaks_through_to_the_inner_gate() -> None:
    inner = TopK(3, 6, 2, bias_update_rate=0.5)
    gate, asked = NullSlots(inner, 2), []
    gate.sum_over_ranks = lambda x: asked.append(x.tolist()) or x
    prefer(gate, 0, 5)
    gate(torch.randn(4, 3))
    gate.end_step()
    assert asked == [[4, 0, 0, 0, 0, 4]]
    assert inner.bias_steps.tolist() == [-1, 1, 1, 1, 1, -1]


def test_schedule_of_the_inner_gate_runs() -> None:
    gate = build("smoe_dropout", 6, 2)
    NullSlots(gate, 2).begin_step(7)
    assert int(gate.step) == 7


def test_balance_only_with_a_weight_and_while_training() -> None:
    assert ada_moe(balance_weight=0.0)(torch.randn(3, 3).double()).aux == {}
    assert ada_moe().eval()(torch.randn(3, 3).double()).aux == {}


@pytest.mark.parametrize("null_slots", [-1, 5, 6])
def test_impossible_numbers_of_null_slots_are_refused(null_slots: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 of the gate's 6 slots as experts, got {null_slots}"):
        NullSlots(TopK(3, 6), null_slots)


def test_config_builds_top_k_over_experts_and_nulls() -> None:
    gate = AdaMoEConfig(k=5, null_slots=3, balance_weight=0.2).build(4, 6, GateContext())
    assert (gate.dim, gate.num_experts, gate.null_slots, gate.balance_weight) == (4, 6, 3, 0.2)
    assert isinstance(gate.gate, TopK)
    assert (gate.gate.num_experts, gate.gate.k) == (9, 5)


def test_config_names_its_fault() -> None:
    assert list(AdaMoEConfig(k=9, null_slots=3).validation_errors(6)) == []
    assert list(AdaMoEConfig(k=10, null_slots=3).validation_errors(6)) == [
        "k=10 exceeds num_experts + null_slots=9; allowed: 1..9"
    ]
