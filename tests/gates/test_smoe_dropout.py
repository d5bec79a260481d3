"""SMoE-Dropout: a router that nothing trains, and a k that is a function of the global step alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import GateContext, SMoEDropout, SMoEDropoutConfig
from dist_moe.layer import MoE
from tests.helpers.oracle import assert_same

PAPER_SWITCHES = [25_001, 75_000, 125_001, 175_000, 225_001, 275_000, 325_001, 375_000]


def paper_gate() -> SMoEDropout:
    """16 experts, k from 8 to 16 over all 400 000 steps."""
    return SMoEDropout(4, 16, 8, 16, 400_000)


class Model(nn.Module):
    """A trained layer below the MoE, a trained head above it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Linear(5, 4)
        self.gate = SMoEDropout(4, 6, 1, 6, 40)
        self.moe = MoE(self.gate, DenseReLUBank(4, 8, 6, range(6)))
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.moe(self.below(x)).outputs[0])


def train(model: Model, optimizer: torch.optim.Optimizer, steps: int = 40) -> None:
    x, y = torch.randn(64, 5), torch.randn(64, 1)
    for step in range(steps):
        model.gate.begin_step(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        model.gate.end_step()


def test_check_c1_frozen_router_is_bit_identical_after_training_and_unknown_to_the_optimizer() -> None:
    model = Model()
    before = model.gate.weight.clone(), model.gate.bias.clone()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    train(model, optimizer)
    assert torch.equal(model.gate.weight, before[0])
    assert torch.equal(model.gate.bias, before[1])
    assert list(model.gate.parameters()) == []
    router = {model.gate.weight.data_ptr(), model.gate.bias.data_ptr()}
    known = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}
    assert not router & known
    assert not any(name.startswith("gate") for name, _ in model.named_parameters())
    assert model.gate.weight.grad is None
    assert not model.gate.weight.requires_grad


def test_check_c2_splitting_a_dense_layer_over_uniform_gates_gives_the_layer_back() -> None:
    torch.manual_seed(0)
    gate = SMoEDropout(4, 8, 8, 8, 1).double()
    gate.weight.zero_()
    x_TD, first, second = torch.randn(7, 4).double(), nn.Linear(4, 32).double(), nn.Linear(32, 4).double()
    dense_TD = second(torch.relu(first(x_TD)))
    parts = zip(first.weight.chunk(8), first.bias.chunk(8), second.weight.chunk(8, dim=1), strict=True)
    expert_ETD = torch.stack([torch.relu(x_TD @ w.T + b) @ v.T for w, b, v in parts])
    assert_same(expert_ETD.sum(dim=0) + second.bias, dense_TD, 1e-12)
    mean_TD = torch.einsum("te,etd->td", gate(x_TD).dense(), expert_ETD)
    assert_same(8 * mean_TD + second.bias, dense_TD, 1e-12)


def test_check_c3_all_experts_equal_the_dense_weighted_sum_in_any_order_of_experts() -> None:
    torch.manual_seed(0)
    gate, bank = SMoEDropout(4, 6, 6, 6, 1).double(), DenseReLUBank(4, 3, 6, range(6)).double()
    x_TD = torch.randn(9, 4).double()
    dispatched_TF = MoE(gate, bank)(x_TD).outputs[0]
    weight_TE = (x_TD @ gate.weight.T + gate.bias).softmax(dim=1)
    assert_same(dispatched_TF, torch.einsum("te,etf->tf", weight_TE, bank.all_experts(x_TD)), 1e-12)
    order = torch.randperm(6)
    for stacked in (gate.weight, gate.bias, bank.weight.data, bank.bias.data):
        stacked.copy_(stacked[order].clone())
    assert_same(MoE(gate, bank)(x_TD).outputs[0], dispatched_TF, 1e-12)


def test_check_c4_schedule_switches_where_the_papers_run_does_with_mean_12() -> None:
    gate = paper_gate()
    ks = [gate.k_at(step) for step in range(400_001)]
    assert [step for step in range(1, 400_001) if ks[step] != ks[step - 1]] == PAPER_SWITCHES
    assert (ks[0], ks[-1], sum(ks) / len(ks)) == (8, 16, 12.0)


@pytest.mark.parametrize("step", [0, *PAPER_SWITCHES, 399_999])
def test_check_c4_a_run_resumed_midway_has_the_same_k(step: int) -> None:
    gate, resumed = paper_gate(), paper_gate()
    gate.begin_step(step)
    resumed.load_state_dict(gate.state_dict())
    route = resumed.eval()(torch.randn(2, 4))
    assert torch.bincount(route.token_N).tolist() == [gate.k_at(step)] * 2
    resumed.train().begin_step(step)
    assert resumed(torch.randn(2, 4)).num_assignments == 2 * gate.k_at(step)


def test_check_c5_routing_drifts_with_the_layers_below_and_repeats_in_evaluation() -> None:
    model, probe = Model(), torch.randn(50, 5)
    model.gate.evaluation_k = 1

    def routed() -> list[int]:
        return model.eval().gate(model.below(probe)).slot_N.tolist()

    before = routed()
    assert routed() == before
    train(model.train(), torch.optim.Adam(model.parameters(), 0.05))
    after = routed()
    assert routed() == after
    assert 0 < sum(a != b for a, b in zip(before, after, strict=True)) < 50


def test_evaluation_at_another_k_does_not_disturb_the_k_of_training() -> None:
    gate, x_TD = SMoEDropout(4, 8, 3, 8, 10, evaluation_k=1), torch.randn(5, 4)
    gate.begin_step(0)
    assert gate.eval()(x_TD).num_assignments == 5
    assert gate.train()(x_TD).num_assignments == 15
    gate.begin_step(0)  # the schedule's k has not changed since
    assert gate(x_TD).num_assignments == 15


def test_router_is_normal_with_deviation_2_percent_from_the_global_generator() -> None:
    torch.manual_seed(0)
    gate = SMoEDropout(256, 64, 1, 64, 10)
    assert gate.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not gate.bias.any()
    assert not torch.equal(SMoEDropout(256, 64, 1, 64, 10).weight, gate.weight)
    torch.manual_seed(0)
    assert torch.equal(SMoEDropout(256, 64, 1, 64, 10).weight, gate.weight)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "exponential", "multi_step"])
@pytest.mark.parametrize(("k_min", "k_max"), [(1, 16), (8, 16), (3, 13), (5, 5)])
def test_schedules_rise_from_one_bound_towards_the_other_and_mirrored_fall(
    schedule: Any, k_min: int, k_max: int
) -> None:
    rising = SMoEDropout(2, 16, k_min, k_max, 1000, schedule)
    falling = SMoEDropout(2, 16, k_min, k_max, 1000, schedule, increasing=False)
    up, down = ([gate.k_at(step) for step in range(1200)] for gate in (rising, falling))
    assert up[0] == k_min
    assert down[0] == k_max
    assert all(a <= b for a, b in pairwise(up))
    assert all(a >= b for a, b in pairwise(down))
    left = 0 if schedule != "exponential" else 0.05 * (k_max - k_min) + 0.5
    assert k_max - left <= up[1000] <= k_max
    assert set(up[1000:]) == {up[1000]}
    assert all(abs(a + b - k_min - k_max) <= 1 for a, b in zip(up, down, strict=True)) or schedule == "multi_step"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1, 5, 9, 12, 16]),  # 1 + round(3.75), round(7.5) which is even, round(11.25)
        ("cosine", [1, 2, 5, 10, 16]),  # 16 - round(15 cos(pi/8)), cos(pi/4), cos(3 pi/8)
        ("exponential", [1, 9, 13, 14, 15]),  # 16 - round(15 * 0.99^75), ^150, ^225, ^300
        ("multi_step", [1, 2, 4, 8, 16]),
    ],
)
def test_schedules_at_their_quarters(schedule: Any, expected: list[int]) -> None:
    gate = SMoEDropout(2, 16, 1, 16, 1000, schedule)
    assert [gate.k_at(step) for step in (0, 250, 500, 750, 1000)] == expected


def test_multi_step_doubles_at_equal_intervals_up_to_the_maximum() -> None:
    gate = SMoEDropout(2, 16, 3, 14, 40, "multi_step")
    assert [gate.k_at(step) for step in (0, 9, 10, 19, 20, 29, 30, 39, 40)] == [3, 3, 6, 6, 12, 12, 14, 14, 14]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 10), "k must lie in 1..num_experts=6, got 0"),
        ((1, 7, 10), "k must lie in 1..num_experts=6, got 7"),
        ((3, 2, 10), "k_min must not exceed k_max, got 3 and 2"),
        ((1, 2, 0), "schedule_steps must be at least 1, got 0"),
    ],
)
def test_impossible_schedules_are_refused(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMoEDropout(4, 6, *arguments)


def test_config_takes_the_length_of_the_run_unless_it_has_its_own() -> None:
    run = GateContext(total_steps=70)
    gate = SMoEDropoutConfig().build(4, 6, run)
    assert (gate.k_min, gate.k_max, gate.schedule_steps, gate.schedule) == (1, 6, 70, "linear")
    config = SMoEDropoutConfig(k_min=2, k_max=4, schedule="cosine", schedule_steps=9, increasing=False, evaluation_k=3)
    gate = config.build(4, 6, run)
    assert (gate.k_min, gate.k_max, gate.schedule_steps, gate.schedule) == (2, 4, 9, "cosine")
    assert (gate.increasing, gate.evaluation_k) == (False, 3)
    with pytest.raises(ValueError, match=r"gate\.schedule_steps=null"):
        SMoEDropoutConfig().build(4, 6, GateContext())


def test_config_names_every_fault() -> None:
    assert list(SMoEDropoutConfig(k_min=2, k_max=6, evaluation_k=6).validation_errors(6)) == []
    assert list(SMoEDropoutConfig(k_min=9, k_max=8, evaluation_k=7).validation_errors(6)) == [
        "k_min=9 exceeds num_experts=6; allowed: 1..6",
        "k_max=8 exceeds num_experts=6; allowed: 1..6",
        "evaluation_k=7 exceeds num_experts=6; allowed: 1..6",
        "k_min=9 exceeds k_max=8",
    ]
