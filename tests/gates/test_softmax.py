"""Softmax: dense, and initialised as Top-k."""

from __future__ import annotations

import torch

from dist_moe.gates import GateContext, Softmax, SoftmaxConfig
from tests.helpers.oracle import assert_same


def test_every_expert_has_its_softmax_weight() -> None:
    gate, x_TD = Softmax(3, 5).double(), torch.randn(4, 3).double()
    route = gate(x_TD)
    assert route.num_assignments == 20
    assert_same(route.dense(), (x_TD @ gate.weight.T + gate.bias).softmax(dim=1), 1e-15)


def test_parameters_are_glorot_uniform_and_zero() -> None:
    torch.manual_seed(0)
    gate = SoftmaxConfig().build(100, 20, GateContext())
    bound = (6 / 120) ** 0.5
    assert 0.98 * bound < gate.weight.abs().max() <= bound
    assert gate.bias.tolist() == [0.0] * 20
