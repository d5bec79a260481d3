"""``torch.vmap`` over stacked gates gives what a loop over the gates gives: shapes depend on no data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.gates import Comet, DSelectK, Gate
from tests.gates.cases import HALF, SATURATED, VARIANTS, build, ids, loss_of, tokens
from tests.helpers.oracle import assert_all_same, assert_same, naive_gradients

SAME_FOR_ALL = ("step",)
WITHOUT_NOISE = [name for name in VARIANTS if name != "top_k_noise"]


class MixtureOf(nn.Module):
    """``forward`` is the gate's mixture, with other numbers for some of its attributes."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x_TD: Tensor, ids_T: Tensor, **attributes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        for name, value in attributes.items():
            setattr(self.gate, name, value)
        mixture = self.gate.mixture(x_TD, ids_T)
        return mixture.weight_TKE, mixture.aux


def stack(gates: list[Gate]) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """Parameters and buffers of all gates as one set, and which axis is the gate."""
    states = [dict(gate.named_parameters(prefix="gate")) | dict(gate.named_buffers(prefix="gate")) for gate in gates]
    axes = {name: None if name.endswith(SAME_FOR_ALL) else 0 for name in states[0]}
    stacked = {
        name: states[0][name] if axes[name] is None else torch.stack([state[name].detach() for state in states])
        for name in states[0]
    }
    return {name: x.requires_grad_(x.is_floating_point()) for name, x in stacked.items()}, axes


def evaluate_stacked(
    gates: list[Gate], state: dict[str, Tensor], axes: dict[str, int | None], x_TD: Tensor, **attributes: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    base, ids_T = MixtureOf(gates[0]), ids(len(x_TD))

    def one(state: dict[str, Tensor], attributes: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(base, state, (x_TD, ids_T), attributes)

    return torch.vmap(one, in_dims=(axes, dict.fromkeys(attributes, 0)))(state, attributes)


@pytest.mark.parametrize("variant", WITHOUT_NOISE)
@pytest.mark.parametrize("hardness", [HALF, SATURATED])
@pytest.mark.parametrize("n", [4, 7])
def test_stacked_gates_equal_the_loop(variant: str, hardness: float, n: int) -> None:
    gates = [build(variant, n, 2, hardness, seed) for seed in (5, 6)]
    state, axes = stack(gates)
    x_TD = tokens(6).detach()
    weight_GTKE, aux = evaluate_stacked(gates, state, axes, x_TD)
    loops = [gate.mixture(x_TD, ids(6)) for gate in gates]
    assert_same(weight_GTKE, torch.stack([loop.weight_TKE for loop in loops]), 1e-12)
    assert_all_same(aux, {name: torch.stack([loop.aux[name] for loop in loops]) for name in loops[0].aux}, 1e-12)


@pytest.mark.parametrize("variant", [name for name in WITHOUT_NOISE if list(build(name, 4, 2).parameters())])
@pytest.mark.parametrize("hardness", [HALF, SATURATED])
def test_gradients_of_stacked_gates_equal_the_loop(variant: str, hardness: float) -> None:
    gates, x_TD = [build(variant, 7, 2, hardness, seed) for seed in (5, 6)], tokens(6).detach()
    state, axes = stack(gates)
    weight_GTKE, aux = evaluate_stacked(gates, state, axes, x_TD)
    losses = [loss_of(w_TKE.flatten(1), {n: x[g] for n, x in aux.items()}) for g, w_TKE in enumerate(weight_GTKE)]
    stacked = naive_gradients(sum(losses), {name: state[f"gate.{name}"] for name, _ in gates[0].named_parameters()})
    for place, gate in enumerate(gates):
        loop = gate.mixture(x_TD, ids(6))
        expected = naive_gradients(loss_of(loop.weight_TKE.flatten(1), loop.aux), dict(gate.named_parameters()))
        assert_all_same({name: grad[place] for name, grad in stacked.items()}, expected)


def test_stacked_gates_count_their_selections_as_the_loop_does() -> None:
    gates = [build("top_k_bias", 7, 2, seed=seed) for seed in (5, 6)]
    state, axes = stack(gates)
    evaluate_stacked(gates, state, axes, tokens(6).detach())
    counted_GE = state["gate.selections"].clone()
    gates = [build("top_k_bias", 7, 2, seed=seed) for seed in (5, 6)]
    for gate in gates:
        gate.mixture(tokens(6).detach())
    assert counted_GE.sum(dim=1).tolist() == [12, 12]
    assert counted_GE.tolist() == [gate.selections.tolist() for gate in gates]


@pytest.mark.parametrize("variant", ["comet", "comet_balance", "comet_static", "dselect_k", "dselect_k_static"])
def test_gamma_and_entropy_weight_may_be_tensors_of_no_dimension(variant: str) -> None:
    gates = [build(variant, 7, 2, seed=seed) for seed in (5, 6)]
    state, axes = stack(gates)
    numbers = {"gamma": torch.tensor([0.3, 2.0]).double(), "entropy_weight": torch.tensor([0.0, 3.0]).double()}
    weight_GTKE, aux = evaluate_stacked(gates, state, axes, tokens(6).detach(), **numbers)
    for place, gate in enumerate(build(variant, 7, 2, seed=seed) for seed in (5, 6)):
        assert isinstance(gate, Comet | DSelectK)
        gate.gamma, gate.entropy_weight = (values[place].item() for values in numbers.values())
        loop = gate.mixture(tokens(6).detach())
        assert_same(weight_GTKE[place], loop.weight_TKE, 1e-12)
        assert_all_same({name: loss[place] for name, loss in aux.items()}, loop.aux, 1e-12)
    assert aux["entropy"][0] == 0 < aux["entropy"][1]
