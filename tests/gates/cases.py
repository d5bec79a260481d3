"""Every gate in every variant, in fp64, at a chosen hardness, and the tokens that suit it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_moe.gates import (
    Comet,
    DSelectK,
    Gate,
    HashRouting,
    NullSlots,
    ReLU,
    SMoEDropout,
    Softmax,
    TopK,
)
from dist_moe.gates.base import affine
from dist_moe.gates.tree import descend
from dist_moe.routing import Route
from tests.helpers.oracle import assert_all_same, assert_same, naive_gate, naive_gradients

DIM, IDS = 3, 50
UNSATURATED, HALF, SATURATED = 0.1, 0.6, 1000.0
Maker = Callable[[int, int, float], Gate]


def comet(train: bool = True, split_slots: bool = False, **options: Any) -> Maker:
    return lambda n, k, h: harden(Comet(DIM, n, k, 0.5, 0.7, **options), "split", h, split_slots).train(train)


def dselect_k(split_slots: bool = False, **options: Any) -> Maker:
    return lambda n, k, h: harden(DSelectK(DIM, n, k, 0.5, 0.7, 0.3, **options), "bit", h, split_slots)


def harden(gate: Comet | DSelectK, part: str, hardness: float, split_slots: bool) -> Gate:
    """Draw all parameters in fp64; those of ``part`` with ``hardness`` times gamma as the spread of its values."""
    for name, parameter in gate.double().named_parameters():
        std = gate.gamma * hardness / (DIM + 1) ** 0.5 if name.startswith(part) else 1.0
        torch.nn.init.normal_(parameter, std=std)
    gate.splits_branches = split_slots
    return gate


def top_k(train: bool = True, **options: Any) -> Maker:
    def make(n: int, k: int, _: float) -> Gate:
        gate = TopK(DIM, n, k, **options).double().train(train)
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter)
        if gate.bias_update_rate:
            gate.bias_steps.random_(-3, 4)
        return gate

    return make


def hash_routing(assignment: str) -> Maker:
    return lambda n, k, _: HashRouting(DIM, n, torch.randint(20, (IDS,)), assignment, seed=n)  # type: ignore[arg-type]


def softmax(n: int, k: int, _: float) -> Gate:
    gate = Softmax(DIM, n).double()
    torch.nn.init.normal_(gate.bias)
    return gate


def smoe_dropout(n: int, k: int, _: float) -> Gate:
    gate = SMoEDropout(DIM, n, 1, n, 10).double()
    gate.weight.normal_()
    gate.begin_step(k)
    return gate


def relu(train: bool = True, **options: Any) -> Maker:
    def make(n: int, k: int, _: float) -> Gate:
        gate = ReLU(DIM, n, k, l1_weight=0.1, **options).double().train(train)
        torch.nn.init.normal_(gate.weight)
        gate.l1_steps += 5
        return gate

    return make


def with_nulls(inner: Maker, nulls: int = 3) -> Maker:
    return lambda n, k, hardness: NullSlots(inner(n + nulls, k, hardness), nulls, 0.4)


VARIANTS: dict[str, Maker] = {
    "comet": comet(),
    "comet_lazy": comet(lazy=True, balance_weight=0.2),
    "comet_max_active": comet(max_active=2),
    "comet_lazy_max_active": comet(lazy=True, max_active=2),
    "comet_hard_evaluation": comet(train=False, hard_evaluation=True),
    "comet_balance": comet(balance_weight=0.2),
    "comet_static": comet(static=True, balance_weight=0.2),
    "comet_split_slots": comet(split_slots=True),
    "comet_split_slots_max_active": comet(split_slots=True, max_active=2),
    "comet_lazy_split_slots_max_active": comet(split_slots=True, max_active=2, lazy=True),
    "top_k": top_k(),
    "top_k_noise": top_k(noise=True, balance_weight=0.2, z_loss_weight=0.1),
    "top_k_losses": top_k(balance_weight=0.2, z_loss_weight=0.1),
    "top_k_bias": top_k(bias_update_rate=0.1, balance_weight=0.2),
    "top_k_before": top_k(scores="softmax_before", balance_weight=0.2),
    "top_k_before_bias": top_k(scores="softmax_before", bias_update_rate=0.1),
    "top_k_sigmoid": top_k(scores="sigmoid", bias_update_rate=0.1, balance_weight=0.2),
    "top_k_evaluation": top_k(train=False, balance_weight=0.2, z_loss_weight=0.1, bias_update_rate=0.1),
    "hash": hash_routing("random"),
    "hash_balanced": hash_routing("balanced"),
    "dselect_k": dselect_k(),
    "dselect_k_static": dselect_k(static=True),
    "dselect_k_split_slots": dselect_k(split_slots=True),
    "softmax": softmax,
    "smoe_dropout": smoe_dropout,
    "relu": relu(),
    "relu_unbalanced": relu(balance=False),
    "relu_evaluation": relu(train=False),
    "ada_moe": with_nulls(top_k()),
    "null_top_k_losses": with_nulls(top_k(balance_weight=0.2, scores="sigmoid")),
    "null_comet": with_nulls(comet()),
    "null_comet_max_active": with_nulls(comet(max_active=2)),
    "null_dselect_k": with_nulls(dselect_k()),
}


def build(variant: str, n: int, k: int, hardness: float = HALF, seed: int = 0) -> Gate:
    torch.manual_seed(seed)
    return VARIANTS[variant](n, k, hardness)


def tokens(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, dtype=torch.float64, generator=generator).requires_grad_()


def ids(count: int, seed: int = 2) -> Tensor:
    return torch.randint(IDS, (count,), generator=torch.Generator().manual_seed(seed))


def loss_of(mixture_TS: Tensor, aux: dict[str, Tensor]) -> Tensor:
    """A number that depends on every entry of the mixture, each by its own weight, and on every loss."""
    cotangent_TS = torch.linspace(-1, 1.5, mixture_TS.numel(), dtype=mixture_TS.dtype).view_as(mixture_TS)
    return (mixture_TS * cotangent_TS).sum() + sum(aux.values(), mixture_TS.new_zeros(()))


def leaf_mass(gate: Comet, x_TD: Tensor) -> Tensor:
    """v, (T, k, n): how much of each token reaches each leaf, by the dense descent."""
    return split_and_leaf_masses(gate, x_TD)[1]


def split_and_leaf_masses(gate: Comet, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    return descend(*gate._split(gate._turn(affine(x_TD, gate.split_weight, gate.split_bias))))


def assert_well_formed(route: Route, gate: Gate, num_tokens: int) -> None:
    """Sorted by token and slot, no pair twice, positive weights, the right sizes and index types."""
    assert (route.num_tokens, route.num_slots) == (num_tokens, gate.num_slots)
    assert route.token_N.dtype == route.slot_N.dtype == torch.int64
    key_N = route.token_N * gate.num_slots + route.slot_N
    assert bool((key_N.diff() > 0).all())
    assert bool((route.weight_N > 0).all())


def rows_sum_to_one(gate: Gate) -> bool:
    """The documented exceptions: logits, Switch weights, codes that are no expert's, tokens with nulls only."""
    if isinstance(gate, DSelectK):
        return gate.num_experts == 2**gate.num_bits
    return not isinstance(gate, NullSlots | ReLU) and not (isinstance(gate, TopK) and gate.scores == "softmax_before")


def check_against_naive(gate: Gate, x_TD: Tensor, seed: int = 3) -> Route:
    """Return the route, equal to the oracle's; every parameter of a gate in training is in the fast path's graph."""
    ids_T = ids(len(x_TD))
    leaves = dict(gate.named_parameters()) | {"x": x_TD}
    torch.manual_seed(seed)
    route = gate(x_TD, ids_T)
    torch.manual_seed(seed)
    expected_TS, expected_aux = naive_gate(gate, x_TD, ids_T)
    assert_well_formed(route, gate, len(x_TD))
    assert_same(route.dense(), expected_TS)
    assert_all_same(route.aux, expected_aux)
    loss = loss_of(route.dense(), route.aux)
    if gate.training and leaves.keys() != {"x"}:
        torch.autograd.grad(loss, list(gate.parameters()), retain_graph=True)
    assert_all_same(naive_gradients(loss, leaves), naive_gradients(loss_of(expected_TS, expected_aux), leaves))
    return route


def pair_of_dense_and_lazy(n: int, k: int, hardness: float, **options: Any) -> tuple[Comet, Comet]:
    gates = []
    for lazy in (False, True):
        torch.manual_seed(n)
        gates.append(comet(lazy=lazy, **options)(n, k, hardness))
    dense, lazy_gate = gates
    assert isinstance(dense, Comet)
    assert isinstance(lazy_gate, Comet)
    return dense, lazy_gate
