"""Assignment search against brute force: where it ends, what it restores, what it takes and what it costs."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.layer import MoE
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from dist_moe.search import (
    AssignmentSearch,
    AssignmentSearchConfig,
    RecordedScores,
    SearchReport,
    SlotTable,
    StreamedScores,
    SwapSearch,
    SwapSearchConfig,
)
from dist_moe.search.moves import Swap, apply, rows_of, swaps_towards
from dist_moe.search.scores import bytes_per_token, streamed_bytes
from tests.helpers.clusters import (
    Mixture,
    Tokens,
    bank_of_rank,
    doubled,
    make_gate,
    make_tokens,
    trained_mixture,
    two_gate_layer,
)

SLOW = pytest.mark.slow
HOUR = pytest.mark.timeout(3600)


def search(model: nn.Module, batches: list[Any], loss: Callable[[Any], Tensor], **options: Any) -> SearchReport:
    """Fitted and verified on the same batches, so that brute force knows the optimum."""
    scores = StreamedScores(model, batches, loss, chunk_bytes=2**20)
    return AssignmentSearch(scores, scores, AssignmentSearchConfig(least_gain=1e-6, **options)).run()


@pytest.mark.parametrize(
    ("n", "starts"), [(4, 24), (5, 8), (6, 4), pytest.param(5, 120, marks=SLOW), pytest.param(6, 720, marks=SLOW)]
)
@pytest.mark.parametrize("name", ["comet", "top_k", "hash"])
def test_every_start_ends_in_the_global_or_a_two_swap_optimum(name: str, n: int, starts: int) -> None:
    """All n! tables enumerated, some or all of them starts; an optimum of two swaps that is no global one is the
    exception."""
    model, tokens = trained_mixture(name, n, 100).double(), doubled(make_tokens(n, 128, seed=2))
    loss_of = {}
    for table in itertools.permutations(range(n)):
        model.table.copy_(torch.tensor(table))
        with torch.no_grad():
            loss_of[table] = model.loss(tokens).item()
    global_ends = 0
    for start in random.Random(n).sample(list(loss_of), starts):
        model.table.copy_(torch.tensor(start))
        report = search(model, [tokens], model.loss, polish=True, max_moves=50)
        found = tuple(model.table.flatten().tolist())
        assert report.losses[-1] == pytest.approx(loss_of[found], rel=1e-9)
        assert report.losses == sorted(report.losses, reverse=True)
        assert report.local_optimum
        for a, b in itertools.combinations(range(n), 2):
            assert loss_of[swapped(found, a, b)] >= loss_of[found] * (1 - 1.1e-6)
        global_ends += loss_of[found] <= min(loss_of.values()) * (1 + 1e-9)
    assert global_ends >= 0.9 * starts


def swapped(table: tuple[int, ...], a: int, b: int) -> tuple[int, ...]:
    changed = list(table)
    changed[a], changed[b] = table[b], table[a]
    return tuple(changed)


def planted(name: str, n: int) -> tuple[Mixture, Tokens, Tensor]:
    """A random mixture, tokens whose targets are what it gives under a planted table, and that table."""
    torch.manual_seed(n)
    model = Mixture(make_gate(name, n), n).double().eval()
    with torch.no_grad():
        for weight in model.moe.gates.parameters():
            weight.normal_()
    tokens = doubled(make_tokens(n, 64 * n, seed=3))
    table = torch.randperm(n)
    model.table.copy_(table)
    with torch.no_grad():
        tokens = replace(tokens, y_TF=model(tokens.x_TD, tokens.id_T))
    model.table.copy_(torch.randperm(n))
    return model, tokens, table


def restored(world: World, model: Mixture, tokens: Tokens) -> tuple[list[int], int]:
    """The table that is found, and the moves; this rank holds its part of the experts and of the tokens."""
    rank, size, n = world.rank, world.size, model.moe.experts.num_experts
    bank, table = bank_of_rank(model.moe.experts, world), SlotTable(n)
    table.table.copy_(model.table)
    mine = copy.deepcopy(model)  # hooks on a gate are a rank's own
    mine.moe = MoE(list(mine.moe.gates), bank, table, world)
    share = -(-tokens.total // size) + 3  # the last rank has less
    part = tokens.part(slice(rank * share, (rank + 1) * share))
    report = search(mine, [part], mine.loss, polish=True, max_moves=n)
    return mine.table.flatten().tolist(), len(report.moves)


@pytest.mark.parametrize("n", [8, 16, pytest.param(32, marks=SLOW), pytest.param(64, marks=[SLOW, HOUR])])
@pytest.mark.parametrize("name", ["comet", "top_k", "hash"])
def test_a_planted_permutation_is_restored_on_one_and_on_several_ranks(name: str, n: int) -> None:
    model, tokens, table = planted(name, n)
    alone, moves = restored(SingleWorld(), model, tokens)
    used = model.moe.gates[0](tokens.x_TD, tokens.id_T).slot_N.unique()  # two of 64 slots of Top-k have no token
    assert torch.equal(torch.tensor(alone)[used], table[used])
    assert len(used) >= n - 2
    assert moves <= n / 2, "fewer than swaps would take"
    for ranks in (2, 4) if n > 16 else (2,):
        of_ranks = EmulatedWorld(ranks).run(lambda world: restored(world, model, tokens))
        assert of_ranks == [(alone, moves)] * ranks


@pytest.mark.parametrize("name", ["comet", "top_k", "hash"])
def test_it_screens_and_verifies_fewer_candidates_than_swap_search(name: str) -> None:
    """16 experts from a random table: docs/gates.md gives the numbers."""
    model, tokens = trained_mixture(name, 16, 100).double(), doubled(make_tokens(16, 256, seed=2))
    start = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    model.table.copy_(start)
    swaps = SwapSearch(RecordedScores(model, [tokens], model.loss), SwapSearchConfig()).run()
    model.table.copy_(start)
    found = search(model, [tokens], model.loss, polish=True, max_moves=50)
    assert found.losses[-1] <= 1.002 * swaps.losses[-1]
    assert found.screened < swaps.screened / 5
    assert found.verified < swaps.verified / 2
    model.table.copy_(start)
    without = search(model, [tokens], model.loss)
    assert without.losses[-1] <= 1.03 * swaps.losses[-1]
    assert without.verified <= 3


def test_what_helps_the_fitted_examples_alone_is_not_taken() -> None:
    model, tokens, _ = planted("top_k", 6)
    start = model.table.clone()
    fitted = StreamedScores(model, [tokens], model.loss, 2**20)
    verified = StreamedScores(model, [tokens], lambda batch: -model.loss(batch), 2**20)
    report = AssignmentSearch(fitted, verified, AssignmentSearchConfig()).run()
    assert (report.verified, report.moves) == (1, [])
    assert torch.equal(model.table, start)


@pytest.mark.parametrize(("slots", "experts", "per_gate", "branches"), [(5, 5, True, 2), (6, 3, False, 1)])
def test_several_rows_and_maps_that_are_many_to_one(slots: int, experts: int, per_gate: bool, branches: int) -> None:
    """All rows move, every expert keeps as many slots, and with polishing no swap is left."""
    moe = two_gate_layer(slots, experts, per_gate, branches)
    table = moe.slot_map
    assert isinstance(table, SlotTable)
    x_TD, y_GTF = torch.randn(60, 5, dtype=torch.float64), torch.randn(2, 60, 3, dtype=torch.float64)

    def loss(_: object) -> Tensor:
        return (torch.stack(moe(x_TD).outputs) - y_GTF).square().mean()

    report = search(moe, [None], loss, polish=True, max_moves=50)
    assert {swap.row for swap in report.swaps} == set(rows_of(table.table))
    counts = torch.bincount(torch.arange(slots) % experts, minlength=experts)
    for row in rows_of(table.table):
        assert torch.equal(torch.bincount(table.table[row], minlength=experts), counts)
        for pair in itertools.combinations(range(slots), 2):
            swap = (Swap(0, row, pair),)
            apply(swap, [table.table])
            with torch.no_grad():
                assert loss(None).item() >= report.losses[-1] * (1 - 1.1e-6)
            apply(swap, [table.table])


def test_slots_without_tokens_keep_their_experts() -> None:
    model, tokens, _ = planted("hash", 6)
    model.moe.gates[0].table[:] = model.moe.gates[0].table % 3
    start = model.table.flatten().tolist()
    tokens = replace(tokens, y_TF=torch.zeros_like(tokens.y_TF))
    search(model, [tokens], model.loss)
    used = set(model.moe.gates[0].table.tolist())
    assert used == {0, 1, 2}
    now = model.table.flatten().tolist()
    away = set(now[:3]) - set(start[:3])  # experts that a used slot has taken from an unused one
    for slot in range(3, 6):
        assert now[slot] == start[slot] or start[slot] in away


@pytest.mark.parametrize("control", ["identity", "random_swaps"])
def test_controls_search_alike_and_take_something_else(control: str) -> None:
    model, tokens, table = planted("top_k", 8)
    start = model.table.clone()
    found = search(model, [tokens], model.loss, polish=True)
    assert torch.equal(model.table[0, 0], table)
    model.table.copy_(start)
    report = search(model, [tokens], model.loss, polish=True, control=control)
    assert (report.losses, report.moves, report.verified) == (found.losses, found.moves, found.verified)
    if control == "identity":
        assert torch.equal(model.table, start)
        return
    assert len(report.taken) == len(report.swaps) > 0
    assert report.taken != report.swaps
    apply(report.taken, [start])
    assert torch.equal(model.table, start)


def test_swaps_lead_from_any_table_to_any_other() -> None:
    for source in itertools.permutations(range(4)):
        table = torch.tensor([[[10, 11, 12, 13]]])
        move = swaps_towards(0, (0, 0), source)
        apply(move, [table])
        assert table.flatten().tolist() == [10 + slot for slot in source]
        assert len(move) <= 3
        apply(reversed(move), [table])
        assert table.flatten().tolist() == [10, 11, 12, 13]


def test_all_experts_see_a_chunk_at_a_time_and_each_token_once() -> None:
    model, tokens, _ = planted("top_k", 8)
    chunk = 10 * bytes_per_token(model.moe, 8)
    scores, rows = StreamedScores(model, [tokens.part(slice(0, 95))], model.loss, chunk), list[int]()
    model.moe.experts.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    with scores.searching():
        scores.gradients()
    assert rows == [2 * 95, *[8 * 10] * 9, 8 * 5]  # the pass by two experts for each token, then the chunks


@SLOW
def test_memory_is_what_was_planned_for_1e5_tokens_and_64_experts() -> None:
    """The results of all experts on all tokens would take 1.6 GB in fp64."""
    model, tokens = Mixture(make_gate("top_k", 64), 64).double().eval(), doubled(make_tokens(64, 100_000, seed=0))
    chunk = 2**26
    planned = streamed_bytes([model.moe], tokens.total, chunk)
    scores = StreamedScores(model, [tokens], model.loss, chunk)
    torch.autograd.grad(model.loss(tokens), list(model.parameters()))  # what is allocated once
    a_pass = peak_of(lambda: torch.autograd.grad(model.loss(tokens), list(model.parameters())))
    with scores.searching():
        taken = peak_of(scores.gradients)
    whole = tokens.total * 64 * 32 * 8
    assert planned < whole / 4
    assert taken <= a_pass + planned
    assert taken >= chunk / 4


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that torch holds on the CPU while ``work`` runs, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
