"""Swap search against brute force: estimates, exact losses, the moves it takes, where it ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.trainable import hold_still
from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet, TopK
from dist_moe.layer import MoE
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from dist_moe.recipes.callbacks.table_search import seed_at
from dist_moe.search import (
    RecordedScores,
    SearchReport,
    SlotTable,
    StreamedScores,
    Swap,
    SwapSearch,
    SwapSearchConfig,
)
from dist_moe.search.moves import take_control
from dist_moe.search.swap import swaps_by_gain
from tests.helpers.clusters import Mixture, Tokens, bank_of_rank, make_tokens, trained_mixture, two_gate_layer
from tests.helpers.worlds import on_real_worlds

SLOW = pytest.mark.slow


def search(model: nn.Module, batches: list[Any], loss: Callable[[Any], Tensor], **options: Any) -> SwapSearch:
    return SwapSearch(RecordedScores(model, batches, loss), SwapSearchConfig(**options))


def scrambled(name: str, num_experts: int, steps: int, seed: int = 0) -> Mixture:
    model = trained_mixture(name, num_experts, steps)
    model.table.copy_(torch.randperm(num_experts, generator=torch.Generator().manual_seed(seed)))
    return model


@torch.no_grad()
def loss_by_running_everything(model: nn.Module, batches: list[Any], loss: Callable[[Any], Tensor]) -> float:
    """No replay, no estimate: the model as it is."""
    model.eval()
    return sum(loss(batch).item() for batch in batches)


def all_swaps(tables: list[Tensor]) -> list[Swap]:
    return [
        Swap(layer, (p, k), pair)
        for layer, table in enumerate(tables)
        for p in range(table.shape[0])
        for k in range(table.shape[1])
        for pair in itertools.combinations(range(table.shape[2]), 2)
    ]


def swap_in_place(tables: list[Tensor], swap: Swap) -> None:
    row = tables[swap.layer][swap.row]
    a, b = swap.slots
    row[a], row[b] = row[b].clone(), row[a].clone()


def naive_greedy(model: nn.Module, tables: list[Tensor], batches: list[Any], loss: Callable[[Any], Tensor]) -> float:
    """Best improvement over all swaps, everything run again for each candidate; the final loss."""
    now = loss_by_running_everything(model, batches, loss)
    while True:
        found = []
        for swap in all_swaps(tables):
            swap_in_place(tables, swap)
            found.append((loss_by_running_everything(model, batches, loss), swap.layer, swap.row, swap.slots))
            swap_in_place(tables, swap)
        best = min(found)
        if best[0] >= now * (1 - 1e-6):
            return now
        now = best[0]
        swap_in_place(tables, Swap(*best[1:]))


@pytest.mark.parametrize("name", ["comet", "top_k", "dselect_k", "hash"])
def test_verifying_all_swaps_of_every_round_is_the_naive_greedy_search(name: str) -> None:
    tokens = make_tokens(6, 300, seed=2)
    batches = [tokens.part(slice(0, 200)), tokens.part(slice(200, 300))]
    naive, fast = scrambled(name, 6, steps=60), scrambled(name, 6, steps=60)
    expected = naive_greedy(naive, [naive.table], batches, naive.loss)
    report = search(fast, batches, fast.loss, verified_per_round=15).run()
    assert torch.equal(fast.table, naive.table)
    assert report.losses[-1] == pytest.approx(expected, rel=1e-6)
    assert report.losses == sorted(report.losses, reverse=True)
    assert report.local_optimum


def test_first_order_gain_is_exact_where_the_loss_is_linear() -> None:
    model = scrambled("comet", 5, steps=0).double()
    cotangent_TF = torch.randn(40, 32, dtype=torch.float64)
    x_TD = torch.randn(40, 16, dtype=torch.float64)

    def linear(_: object) -> Tensor:
        return (model.moe(x_TD).outputs[0] * cotangent_TF).sum()

    scores = RecordedScores(model, [None], linear)
    with scores.searching():
        (before,) = scores.losses([()])
        gradients = scores.gradients()
        swaps = swaps_by_gain(scores.tables, gradients, 1e-15)
        losses = scores.losses(swaps)
    assert len(swaps) == 10
    assert losses == sorted(losses), "the order of the estimates is the order of the exact losses"
    gradient = gradients[0][0, 0]
    for (swap,), loss in zip(swaps, losses, strict=True):
        a, b = swap.slots
        at_a, at_b = model.table[0, 0, a], model.table[0, 0, b]
        estimate = gradient[a, at_a] + gradient[b, at_b] - gradient[a, at_b] - gradient[b, at_a]
        assert estimate.item() == pytest.approx(before - loss, abs=1e-10)


def test_ends_in_a_local_optimum() -> None:
    model = scrambled("top_k", 8, steps=30)
    tokens = make_tokens(8, 400, seed=4)
    report = search(model, [tokens], model.loss, verified_per_round=5).run()
    assert report.local_optimum
    assert report.losses[-1] == pytest.approx(loss_by_running_everything(model, [tokens], model.loss), rel=1e-6)
    for swap in all_swaps([model.table]):
        swap_in_place([model.table], swap)
        loss = loss_by_running_everything(model, [tokens], model.loss)
        assert loss >= report.losses[-1] * (1 - 1.1e-6)
        swap_in_place([model.table], swap)


@pytest.mark.parametrize("broken", [slice(1), slice(None)])
def test_losses_that_are_not_finite_end_the_search(broken: slice) -> None:
    """Also where exchanging the broken expert for one that no token meets would make the loss finite."""
    model, tokens = scrambled("hash", 6, 0), make_tokens(6, 60, seed=1)
    gate = model.moe.gates[0]
    gate.table[:] = gate.table % 3
    with torch.no_grad():
        for weight in model.moe.experts.parameters():
            weight[model.table.flatten()[broken]] = torch.nan
    found = search(model, [tokens], model.loss).run()
    assert (found.verified, found.moves, found.local_optimum) == (0, [], False)


def test_random_swaps_exchange_different_experts() -> None:
    """A map of 6 slots to 2 experts, in which two of five swaps would change nothing."""
    wanted = Swap(0, (0, 0), (0, 1))
    for seed in range(50):
        table = torch.tensor([[[1, 0, 0, 1, 0, 1]]])
        (drawn,) = take_control("random_swaps", (wanted,), [table], seed)
        first, second = table[0, 0, list(drawn.slots)].tolist()
        assert first != second
    assert seed_at(0, 10) != seed_at(5, 5)


def test_budgets_end_the_search() -> None:
    tokens = make_tokens(8, 200, seed=5)
    model = scrambled("top_k", 8, steps=60)
    report = search(model, [tokens], model.loss, max_swaps=2).run()
    assert (len(report.swaps), len(report.losses), report.local_optimum) == (2, 3, False)
    model = scrambled("top_k", 8, steps=60)
    report = search(model, [tokens], model.loss, max_verified=8, verified_per_round=4).run()
    assert report.verified <= 8
    assert not report.local_optimum
    assert search(model, [tokens], model.loss, max_swaps=0).run().swaps == ()


@pytest.mark.parametrize(("most", "per_round"), [(7, 4), (3, 4), (27, 100)])
def test_a_budget_that_no_round_fits(most: int, per_round: int) -> None:
    """The tables of 8 experts have 28 swaps. A search that could not verify them all knows no local optimum."""
    tokens, model = make_tokens(8, 200, seed=5), scrambled("top_k", 8, steps=60)
    search(model, [tokens], model.loss, verified_per_round=100).run()
    at_optimum = model.table.clone()
    report = search(model, [tokens], model.loss, max_verified=most, verified_per_round=per_round).run()
    assert (report.swaps, report.verified, report.local_optimum) == ((), most, False)
    report = search(model, [tokens], model.loss, max_verified=28, verified_per_round=per_round).run()
    assert (report.swaps, report.verified, report.local_optimum) == ((), 28, True)
    assert torch.equal(model.table, at_optimum)


def test_experts_run_once_per_batch_however_many_candidates() -> None:
    model = scrambled("comet", 8, steps=60)
    tokens = make_tokens(8, 200, seed=6)
    rows: list[int] = []
    model.moe.experts.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    report = search(model, [tokens.part(slice(0, 120)), tokens.part(slice(120, 200))], model.loss).run()
    assert report.verified > 30
    assert rows == [120 * 8, 80 * 8]


def test_leaves_the_model_as_it_was_but_for_the_table_also_after_an_error() -> None:
    model = scrambled("comet", 4, steps=10).train()
    tokens = make_tokens(4, 50, seed=7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    search(model, [tokens], model.loss).run()
    assert model.training
    assert model.moe._replay is None
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["moe.slot_map.table"]
    assert all(parameter.grad is None for parameter in model.parameters())

    def fail(_: Tokens) -> Tensor:
        raise ArithmeticError("no loss")

    table = model.table.clone()
    with pytest.raises(ArithmeticError, match="no loss"):
        search(model, [tokens], fail).run()
    assert model.training
    assert model.moe._replay is None
    assert torch.equal(model.table, table)


class TwoLayers(nn.Module):
    """The second layer routes by what the first one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MoE(TopK(6, 4, k=2), DenseReLUBank(6, 6, 4, range(4)), SlotTable(4))
        self.second = MoE(Comet(6, 5, k=2, gamma=0.1), DenseReLUBank(6, 3, 5, range(5)), SlotTable(5))
        with torch.no_grad():
            self.second.gates[0].split_weight.normal_()

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.second(x_TD + self.first(x_TD).outputs[0]).outputs[0]

    @property
    def tables(self) -> list[Tensor]:
        return [self.first.slot_map.table, self.second.slot_map.table]


def twins() -> tuple[TwoLayers, TwoLayers, Callable[[nn.Module], Callable[[object], Tensor]]]:
    """Two equal models, and the loss of either."""
    torch.manual_seed(8)
    naive, fast = TwoLayers().double(), TwoLayers().double()
    fast.load_state_dict(naive.state_dict())
    x_TD, y_TF = torch.randn(50, 6, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64)
    return naive, fast, lambda model: lambda _: (model(x_TD) - y_TF).square().mean()


def test_several_layers_are_searched_as_one() -> None:
    naive, fast, loss_of = twins()
    expected = naive_greedy(naive, naive.tables, [None], loss_of(naive))
    report = search(fast, [None], loss_of(fast), verified_per_round=16).run()
    assert report.losses[-1] == pytest.approx(expected, rel=1e-9)
    assert {swap.layer for swap in report.swaps} == {0, 1}
    assert all(map(torch.equal, fast.tables, naive.tables))


def test_tables_that_are_held_still_are_left_alone() -> None:
    naive, fast, loss_of = twins()
    first = fast.tables[0].clone()
    naive_greedy(naive, naive.tables[1:], [None], loss_of(naive))
    with hold_still(fast, ["second.*"]):
        report = search(fast, [None], loss_of(fast), verified_per_round=16).run()
    assert report.swaps
    assert torch.equal(fast.tables[0], first)
    assert torch.equal(fast.tables[1], naive.tables[1])
    with hold_still(fast, ["second.gates.*"]), pytest.raises(ValueError, match="no MoE layer with a slot"):
        search(fast, [None], lambda _: torch.zeros(()))


def gradients_of(model: nn.Module, loss: Callable[[Any], Tensor], streamed: bool) -> list[Tensor]:
    """D of every layer; streamed in chunks of one or two tokens, or from recordings."""
    made = StreamedScores(model, [None], loss, chunk_bytes=1500) if streamed else RecordedScores(model, [None], loss)
    with made.searching():
        return made.gradients()


@pytest.mark.parametrize("streamed", [False, True])
def test_gradient_of_the_first_layer_flows_through_the_second(streamed: bool) -> None:
    torch.manual_seed(9)
    model = TwoLayers().double()
    x_TD = torch.randn(30, 6, dtype=torch.float64)
    first, _ = gradients_of(model, lambda _: model(x_TD).square().mean(), streamed)
    step = 1e-6
    matrix = torch.eye(4, dtype=torch.float64)[model.first.slot_map.table[0, 0]]
    results_TEF = model.first.all_results(x_TD)
    g_TS = model.first.gates[0](x_TD).dense()

    def loss_at(matrix_SE: Tensor) -> Tensor:
        y_TF = torch.einsum("ts,se,tef->tf", g_TS, matrix_SE, results_TEF)
        return model.second(x_TD + y_TF).outputs[0].square().mean()

    for slot, expert in ((0, 1), (3, 2)):
        moved = matrix.clone()
        moved[slot, expert] += step
        slope = (loss_at(moved) - loss_at(matrix)) / step
        assert first[0, 0, slot, expert].item() == pytest.approx(slope.item(), rel=1e-3, abs=1e-6)


def naive_against_search(slots: int, experts: int, per_gate: bool, branches: int) -> tuple[Tensor, SearchReport]:
    """The table and the report of a search that ends where the naive one does."""
    torch.manual_seed(9)
    x_TD = torch.randn(40, 5, dtype=torch.float64)
    y_GTF = torch.randn(2, 40, 3, dtype=torch.float64)
    naive, fast = (two_gate_layer(slots, experts, per_gate, branches) for _ in range(2))

    def loss_of(moe: MoE) -> Callable[[object], Tensor]:
        return lambda _: (torch.stack(moe(x_TD).outputs) - y_GTF).square().mean()

    expected = naive_greedy(naive, [naive.slot_map.table], [None], loss_of(naive))
    report = search(fast, [None], loss_of(fast), verified_per_round=100).run()
    assert fast.slot_map.table.shape == (2 if per_gate else 1, branches, slots)
    assert report.losses[-1] == pytest.approx(expected, rel=1e-9)
    assert torch.equal(fast.slot_map.table, naive.slot_map.table)
    return fast.slot_map.table, report


@pytest.mark.parametrize(("slots", "experts"), [(4, 4), (6, 3), (5, 2), (3, 5)])
@pytest.mark.parametrize(("per_gate", "branches"), [(False, 1), (True, 1), (False, 2), (True, 2)])
def test_tables_per_gate_and_per_branch_also_many_to_one(
    slots: int, experts: int, per_gate: bool, branches: int
) -> None:
    """Every expert keeps as many slots, and slots of the same expert are no candidates."""
    table, report = naive_against_search(slots, experts, per_gate, branches)
    assert report.swaps
    assert len({swap.row for swap in report.swaps}) > 1 or (len(table), branches) == (1, 1) or slots != experts
    counts = torch.bincount(torch.arange(slots) % experts, minlength=experts)
    for expert_S in table.flatten(0, 1):
        assert torch.equal(torch.bincount(expert_S, minlength=experts), counts)
    pairs = slots * (slots - 1) // 2 - int((counts * (counts - 1) // 2).sum())
    assert report.screened == pairs * len(table) * branches * (len(report.swaps) + 1)
    assert report.local_optimum


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("table", [[2, 0, 1], [0, 1, 1, 2, 0], [2, 2, 2, 2, 2], [1, 0, 2, 0, 2]])
def test_the_gradient_of_a_map_is_that_of_a_loop_over_slots_and_experts(table: list[int], streamed: bool) -> None:
    torch.manual_seed(12)
    slots = len(table)
    slot_table = SlotTable(3, num_slots=slots)
    slot_table.table[0, 0] = torch.tensor(table)
    moe = MoE(Comet(4, slots, k=2), DenseReLUBank(4, 2, 3, range(3)), slot_table).double()
    x_TD = torch.randn(9, 4, dtype=torch.float64)
    matrix = torch.zeros(slots, 3, dtype=torch.float64)
    matrix[range(slots), table] = 1.0
    matrix.requires_grad_()
    with torch.no_grad():
        g_TS = moe.gates[0](x_TD).dense()
        f = [torch.relu(x_TD @ w + b) for w, b in zip(moe.experts.weight, moe.experts.bias, strict=True)]
    y_TF = sum(g_TS[:, s, None] * matrix[s, e] * f[e] for s in range(slots) for e in range(3))
    (expected,) = torch.autograd.grad(y_TF.square().mean(), matrix)
    (found,) = gradients_of(moe, lambda _: moe(x_TD).outputs[0].square().mean(), streamed)
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=1e-12)


def test_a_model_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no MoE layer with a slot -> expert table"):
        search(nn.Linear(2, 2), [], lambda _: torch.zeros(()))


def test_a_layer_that_the_loss_does_not_use_is_refused() -> None:
    model = TwoLayers()
    x_TD = torch.randn(5, 6)
    with pytest.raises(ValueError, match="takes no part in the loss"):
        search(model, [None], lambda _: model.first(x_TD).outputs[0].square().mean()).run()
    assert model.second._replay is None


def restore(name: str, num_experts: int, steps: int, num_ranks: int) -> tuple[float, float, list[list[int]]]:
    """Loss before the scrambling and after the search, and the table of every rank."""
    tokens = make_tokens(num_experts, 1024, seed=11)
    original = trained_mixture(name, num_experts, steps)
    reference = loss_by_running_everything(original, [tokens], original.loss)
    models = [scrambled(name, num_experts, steps, seed=1) for _ in range(num_ranks)]
    share = -(-tokens.total // num_ranks)

    def search_on_rank(world: World) -> tuple[float, list[int]]:
        model = models[world.rank]
        mine = tokens.part(slice(world.rank * share, (world.rank + 1) * share))
        report = search(model, [mine], model.loss).run()
        return report.losses[-1], model.table.flatten().tolist()

    results = EmulatedWorld(num_ranks).run(search_on_rank)
    return reference, results[0][0], [table for _, table in results]


@pytest.mark.parametrize("name", ["comet", "top_k", "dselect_k", "hash"])
@pytest.mark.parametrize(("num_experts", "steps"), [(8, 400), *(pytest.param(n, 2000, marks=SLOW) for n in (16, 32))])
def test_planted_permutation_is_undone_on_one_and_on_four_ranks(name: str, num_experts: int, steps: int) -> None:
    reference, alone, tables = restore(name, num_experts, steps, num_ranks=1)
    assert alone <= 1.005 * reference
    _, together, of_ranks = restore(name, num_experts, steps, num_ranks=4)
    assert num_experts > 8 or together == pytest.approx(alone, rel=1e-5)
    assert of_ranks == tables * 4


def search_with_experts_split(world: World, shares: list[int]) -> tuple[list[float], list[Swap], list[int]]:
    """Losses, swaps and table; this rank holds its part of the experts and of the tokens."""
    tokens = make_tokens(8, sum(shares), seed=12)
    model = scrambled("top_k", 8, steps=60)
    model.moe.experts, model.moe.world = bank_of_rank(model.moe.experts, world), world
    start = sum(shares[: world.rank])
    report = search(model.eval(), [tokens.part(slice(start, start + shares[world.rank]))], model.loss).run()
    return report.losses, report.swaps, model.table.flatten().tolist()


@pytest.mark.parametrize("shares", [[200, 0], [70, 0, 81, 49], [0, 0, 20, 0, 0, 100, 80, 0]])
def test_ranks_with_experts_split_and_some_without_tokens(shares: list[int]) -> None:
    losses, swaps, table = search_with_experts_split(SingleWorld(), [200])
    assert len(swaps) > 1
    for of_rank in EmulatedWorld(len(shares)).run(lambda world: search_with_experts_split(world, shares)):
        assert of_rank == (pytest.approx(losses, rel=1e-5), swaps, table)


def test_emulated_ranks_search_like_real_ones() -> None:
    shares = [70, 0, 81, 49]
    real = on_real_worlds(4, search_with_experts_split, shares)
    emulated = EmulatedWorld(4).run(lambda world: search_with_experts_split(world, shares))
    for (losses, swaps, table), of_rank in zip(emulated, real, strict=True):
        assert of_rank == (pytest.approx(losses, rel=1e-14), swaps, table)
    assert {str(of_rank) for of_rank in emulated} == {str(emulated[0])}
