"""Hash routing: a table by id, random or balanced, that is part of the checkpoint."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.gates import GateContext, HashRouting, HashRoutingConfig
from dist_moe.gates.hash_routing import balanced_assignment

UNIFORM = torch.ones(8000, dtype=torch.int64)


def loads_of(table: Tensor, counts: Tensor, num_experts: int) -> list[float]:
    return torch.bincount(table, counts.double(), num_experts).tolist()


def test_token_goes_to_the_expert_of_its_id_with_weight_one_whatever_it_looks_like() -> None:
    gate = HashRouting(3, 5, UNIFORM)
    ids_T = torch.tensor([7, 0, 7, 7999], dtype=torch.int32)
    for x_TD in (torch.randn(4, 3), torch.zeros(4, 3)):
        route = gate(x_TD, ids_T)
        assert route.token_N.tolist() == [0, 1, 2, 3]
        assert route.slot_N.tolist() == gate.table[ids_T.long()].tolist()
        assert route.weight_N.tolist() == [1.0] * 4
        assert route.aux == {}


def test_random_table_is_uniform_and_fixed_by_its_seed_alone() -> None:
    table = HashRouting(3, 8, UNIFORM, seed=1).table
    assert table.dtype == torch.int64
    share_E = torch.bincount(table, minlength=8) / 8000
    assert 0.11 < share_E.min() < share_E.max() < 0.14
    state = torch.get_rng_state()
    assert torch.equal(HashRouting(3, 8, UNIFORM * 5, seed=1).table, table)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(HashRouting(3, 8, UNIFORM, seed=2).table, table)


@pytest.mark.parametrize("num_experts", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_balanced_loads_differ_by_the_least_count_where_rare_ids_abound(num_experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    counts = torch.cat([torch.randint(1, 50, (20,)), torch.ones(60 * num_experts, dtype=torch.int64)])
    loads = loads_of(balanced_assignment(counts, num_experts, seed), counts, num_experts)
    assert max(loads) - min(loads) <= 1


def test_balanced_ids_are_dealt_out_by_falling_counts() -> None:
    """By hand: 4 and 3 are apart, 2 is where neither is, and who never occurs is where the load is least: with 2."""
    counts = torch.tensor([2, 4, 0, 3, 0])
    tables = [balanced_assignment(counts, 3, seed).tolist() for seed in range(60)]
    for of_2, of_4, of_0, of_3, of_other_0 in tables:
        assert {of_2, of_4, of_3} == {0, 1, 2}
        assert of_0 == of_other_0 == of_2
    assert len({tuple(table) for table in tables}) == 6


def test_balanced_tables_of_two_seeds_agree_no_more_often_than_by_chance() -> None:
    counts = (1e4 / torch.arange(1, 2001)).long()
    one, two = (balanced_assignment(counts, 8, seed) for seed in (0, 1))
    assert torch.equal(one, balanced_assignment(counts, 8, 0))
    assert 0.09 < (one == two).double().mean() < 0.16


def test_balanced_loads_are_nearly_equal_where_random_ones_are_not() -> None:
    counts = (1e4 / torch.arange(1, 2001)).long()
    balanced = loads_of(HashRouting(3, 4, counts, "balanced").table, counts, 4)
    random = loads_of(HashRouting(3, 4, counts, "random").table, counts, 4)
    assert max(balanced) <= 1.05 * min(balanced)
    assert max(random) > 1.05 * min(random)


def test_table_is_in_the_checkpoint_and_there_is_nothing_to_train() -> None:
    gate, loaded = HashRouting(3, 4, UNIFORM, seed=1), HashRouting(3, 4, UNIFORM, seed=2)
    loaded.load_state_dict(gate.state_dict())
    assert torch.equal(loaded.table, gate.table)
    assert list(gate.parameters()) == []
    assert gate.bfloat16().table.dtype == torch.int64


@pytest.mark.parametrize(
    ("ids_T", "message"),
    [
        (None, "hash routing needs ids_T, the tokens' ids, and got None"),
        (torch.tensor([0, 5]), "ids_T must lie in 0..4, the ids of the table, got 0..5"),
        (torch.tensor([-1, 2]), "ids_T must lie in 0..4, the ids of the table, got -1..2"),
        (torch.tensor([1]), "ids_T must be 2 integers, got (1,) of torch.int64"),
        (torch.tensor([0.0, 1.0]), "ids_T must be 2 integers, got (2,) of torch.float32"),
        (torch.tensor([True, False]), "ids_T must be 2 integers, got (2,) of torch.bool"),
    ],
)
def test_unusable_ids_are_refused(ids_T: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        HashRouting(3, 4, torch.ones(5))(torch.zeros(2, 3), ids_T)


def test_no_token_needs_no_valid_id() -> None:
    route = HashRouting(3, 4, torch.ones(5))(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert (route.num_assignments, route.num_tokens, route.num_slots) == (0, 0, 4)


def test_config_builds_the_gate_it_describes_from_the_ids_of_the_data() -> None:
    counts = torch.tensor([5, 1, 1, 1, 1, 1])
    gate = HashRoutingConfig(assignment="balanced").build(3, 2, GateContext(id_counts=counts))
    assert gate.table.tolist() in ([0, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0])
    seeded = HashRoutingConfig(seed=4).build(3, 2, GateContext(id_counts=counts))
    assert torch.equal(seeded.table, HashRouting(3, 2, counts, seed=4).table)


@pytest.mark.parametrize("assignment", ["random", "balanced"])
def test_every_layer_has_a_table_of_its_own_which_no_other_seed_has(assignment: Any) -> None:
    made = [HashRoutingConfig(seed=seed, assignment=assignment) for seed in range(4)]
    settings = [each.of_layer(layer) for each in made for layer in range(12)]
    tables = {tuple(each.build(3, 4, GateContext(id_counts=UNIFORM)).table.tolist()) for each in settings}
    assert len(tables) == 4 * 12
    assert HashRoutingConfig(seed=3).of_layer(0) == HashRoutingConfig(seed=3)


def test_data_without_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="the data has no ids to route by"):
        HashRoutingConfig().build(3, 4, GateContext())
