"""Auxiliary losses and feedback of several ranks, with unequal shares of the tokens, are those of one rank."""

from __future__ import annotations

from copy import deepcopy

import pytest
from torch import Tensor

from dist_moe.gates import Gate, TopK
from dist_moe.parallel import EmulatedWorld, World, sum_over_ranks
from tests.gates.cases import VARIANTS, build, ids, tokens
from tests.helpers.oracle import assert_same, naive_gradients

SHARES = ([4, 3], [7, 0], [1, 5, 2])
WITHOUT_NOISE = [name for name in VARIANTS if name != "top_k_noise"]  # each rank draws for its own tokens


def build_for_ranks(variant: str) -> Gate:
    """6 experts, k = 2; statistics are those of all ranks of the job, be it one or many."""
    gate = build(variant, 6, 2)
    gate.sum_over_ranks = sum_over_ranks
    return gate


def losses_and_gradients(gate: Gate, x_TD: Tensor, ids_T: Tensor) -> dict[str, Tensor]:
    """Each loss, and its gradient to each parameter."""
    results = {}
    for name, loss in gate(x_TD, ids_T).aux.items():
        results[name] = loss.detach()
        grads = naive_gradients(gate(x_TD, ids_T).aux[name], dict(gate.named_parameters()))
        results |= {f"{name} to {parameter}": grad for parameter, grad in grads.items()}
    return results


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("variant", WITHOUT_NOISE)
def test_losses_weighted_by_the_ranks_shares_are_the_loss_of_the_whole_batch(variant: str, shares: list[int]) -> None:
    gate, total = build_for_ranks(variant), sum(shares)
    x_TD, ids_T = tokens(total).detach(), ids(total)
    gates, parts, part_ids = [deepcopy(gate) for _ in shares], x_TD.split(shares), ids_T.split(shares)

    def on_rank(world: World) -> dict[str, Tensor]:
        return losses_and_gradients(gates[world.rank], parts[world.rank], part_ids[world.rank])

    ranks = EmulatedWorld(len(shares)).run(on_rank)
    for name, expected in losses_and_gradients(gate, x_TD, ids_T).items():
        actual = sum(count / total * rank[name] for count, rank in zip(shares, ranks, strict=True))
        assert_same(actual, expected, 1e-10, name)


@pytest.mark.parametrize(
    ("variant", "loss"),
    [
        ("comet_balance", "split_balance"),
        ("comet_lazy", "split_balance"),
        ("top_k_losses", "load_balance"),
        ("relu", "l1"),
        ("ada_moe", "null_balance"),
        ("null_top_k_losses", "load_balance"),
    ],
)
def test_balance_on_every_rank_is_that_of_the_whole_batch_and_not_of_its_part(variant: str, loss: str) -> None:
    gate, x_TD = build_for_ranks(variant), tokens(9).detach()
    gates, parts = [deepcopy(gate) for _ in range(2)], x_TD.split([2, 7])

    def on_rank(world: World) -> Tensor:
        return gates[world.rank](parts[world.rank]).aux[loss].detach()

    whole = gate(x_TD).aux[loss]
    for part, of_rank in zip(parts, EmulatedWorld(2).run(on_rank), strict=True):
        assert_same(of_rank, whole, 1e-12)
        assert (gate(part).aux[loss] - whole).abs() > 1e-4


def test_every_rank_moves_its_selection_bias_by_the_load_of_all_ranks() -> None:
    gate = build_for_ranks("top_k_bias")
    assert isinstance(gate, TopK)
    x_TD, start = tokens(9).detach(), gate.bias_steps.clone()
    gates, parts = [deepcopy(gate) for _ in range(3)], x_TD.split([1, 2, 6])

    def on_rank(world: World) -> Tensor:
        own = gates[world.rank]
        own(parts[world.rank])
        own.end_step()
        return own.bias_steps - start

    load_E = gate(x_TD).tokens_per_slot
    mean = load_E.sum().item() / 6
    expected = [(load < mean) - (load > mean) for load in load_E.tolist()]
    assert len(set(expected)) > 1
    assert [moved.tolist() for moved in EmulatedWorld(3).run(on_rank)] == [expected] * 3
