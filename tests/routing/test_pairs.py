"""The union of several routes: each (token, expert) pair once, with every gate's weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_moe.routing import Route, union_of_routes


@st.composite
def mixtures(draw: st.DrawFn) -> list[Tensor]:
    gates, tokens, experts = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(1, 5))
    size = gates * tokens * experts
    values = draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]), min_size=size, max_size=size))
    return list(torch.tensor(values, dtype=torch.float64).view(gates, tokens, experts))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(mixtures())
def test_equals_naive_dictionary(weights: list[Tensor]) -> None:
    tokens, experts = weights[0].shape
    naive: dict[tuple[int, int], list[float]] = {}
    for g, weight_TE in enumerate(weights):
        for t in range(tokens):
            for e in range(experts):
                if weight_TE[t, e] != 0:
                    naive.setdefault((e, t), [0.0] * len(weights))[g] = weight_TE[t, e].item()

    pairs = union_of_routes([Route.from_dense(weight_TE) for weight_TE in weights])
    keys = list(zip(pairs.expert_N.tolist(), pairs.token_N.tolist(), strict=True))
    assert keys == sorted(naive)
    assert pairs.weight_GN.shape == (len(weights), len(naive))
    assert pairs.weight_GN.T.tolist() == [naive[key] for key in keys]
    assert pairs.rows_per_expert_E.tolist() == [sum(e == expert for e, _ in naive) for expert in range(experts)]
    assert (pairs.num_pairs, pairs.num_tokens) == (len(naive), tokens)


def test_order_of_a_token_s_assignments_does_not_matter() -> None:
    weight_TE = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])
    route = Route.from_dense(weight_TE)
    order = torch.tensor([1, 0, 2])
    shuffled = Route(route.token_N[order], route.slot_N[order], route.weight_N[order], 2, 3)
    for name in ("token_N", "expert_N", "weight_GN", "rows_per_expert_E"):
        assert torch.equal(getattr(union_of_routes([shuffled]), name), getattr(union_of_routes([route]), name))


def test_gradient_of_every_gate_is_its_own() -> None:
    first = torch.tensor([[0.5, 0.5]], requires_grad=True)
    second = torch.tensor([[0.0, 1.0]], requires_grad=True)
    pairs = union_of_routes([Route.from_dense(first), Route.from_dense(second)])
    (pairs.weight_GN * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    assert first.grad.tolist() == [[1.0, 2.0]]
    assert second.grad.tolist() == [[0.0, 4.0]]


@pytest.mark.parametrize("other", [(3, 4), (2, 5), (0, 4)])
def test_routes_of_different_sizes_are_refused(other: tuple[int, int]) -> None:
    routes = [Route.from_dense(torch.ones(2, 4)), Route.from_dense(torch.ones(*other))]
    with pytest.raises(ValueError, match="must agree on"):
        union_of_routes(routes)
