"""The exchange in chunks: the flat exchange's results, the order of its collectives, and that they do overlap."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_moe.engine.launch.process_groups import ParallelConfig
from dist_moe.errors import UserError
from dist_moe.parallel import (
    WIRES,
    EmulatedWorld,
    ExchangeOptions,
    FlatExchange,
    OverlappedExchange,
    ProcessWorld,
    World,
)
from dist_moe.parallel.overlapped import _parts, parts_of
from tests.helpers.oracle import assert_all_same, gradients
from tests.helpers.worlds import both_kinds, on_real_worlds, run_worlds
from tests.layer.cases import Case, build_layer
from tests.parallel.shares import Share, shares_of, step

SPLITS = {2: [[3, 2], [0, 4], [0, 0]], 4: [[2, 0, 1, 3], [0, 0, 0, 6]]}
CASES = {
    "comet": Case(num_gates=2, hardness=0.6, num_experts=16),
    "comet-hard-trees": Case(num_gates=3, k=3, hardness=1000.0, num_experts=16),
    "top-k": Case(gate="top_k", num_gates=2, k=5, num_experts=16),
}


def test_chunks_are_about_equal_and_never_empty() -> None:
    for count in range(1, 9):
        for parts in range(1, 11):
            ranges = _parts(count, parts)
            assert [i for part in ranges for i in part] == list(range(count))
            assert len(ranges) == min(parts, count)
            assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def chunked(run: Any, parts: list[Share], chunks: int, wire: str | None = None) -> list[tuple[dict[str, Tensor], int]]:
    """A step of all ranks with ``chunks`` chunks, and without chunks where there is one."""

    def of_rank(world: World) -> tuple[dict[str, Tensor], int]:
        moe = parts[world.rank][0].moe(world)
        assert isinstance(moe.exchange, OverlappedExchange if chunks > 1 else FlatExchange)
        return step(parts[world.rank], world)

    return run(len(parts), of_rank, options=ExchangeOptions(WIRES[wire], chunks))


def assert_same_steps(
    actual: list[tuple[dict[str, Tensor], int]], expected: list[tuple[dict[str, Tensor], int]]
) -> None:
    for (results, size), (flat_results, flat_size) in zip(actual, expected, strict=True):
        torch.testing.assert_close(results["out"], flat_results["out"], rtol=1e-13, atol=1e-13)
        assert_all_same(results, flat_results, 1e-12)
        assert size == flat_size


@both_kinds
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("num_ranks", "chunks"), [(2, 2), (2, 3), (4, 2), (4, 9)])
def test_results_are_those_of_the_flat_exchange(run: Any, name: str, num_ranks: int, chunks: int) -> None:
    for tokens_per_rank in SPLITS[num_ranks]:
        parts = shares_of(CASES[name], tokens_per_rank)
        assert_same_steps(chunked(run, parts, chunks), chunked(run, parts, 1))


@both_kinds
@pytest.mark.parametrize(("wire", "learning"), [(None, False), ("bf16", True), ("fp8_e4m3", True)])
def test_rows_are_rounded_and_sent_back_as_in_the_flat_exchange(run: Any, wire: str | None, learning: bool) -> None:
    """Tokens without gradients send none back."""
    parts = shares_of(CASES["top-k"], [3, 2], learning)
    assert_same_steps(chunked(run, parts, 4, wire), chunked(run, parts, 1, wire))


@pytest.mark.parametrize("learning", [True, False])
def test_a_chunk_is_computed_while_its_neighbours_travel_and_the_order_is_fixed(
    monkeypatch: pytest.MonkeyPatch, learning: bool
) -> None:
    """Begun and awaited collectives and expert calls, forward and backward; the same on a rank without tokens."""
    parts = shares_of(CASES["top-k"], [5, 0], learning)
    local = threading.local()
    begin = ProcessWorld.begin_exchange

    def logged(world: ProcessWorld, x_ND: Tensor, send_rows: list[int], receive_rows: list[int]) -> Any:
        pending = begin(world, x_ND, send_rows, receive_rows)
        number = local.begun = local.begun + 1
        wait = pending.wait
        pending.wait = lambda: (local.log.append(f"end {number}"), wait())[1]
        local.log.append(f"begin {number}")
        return pending

    monkeypatch.setattr(ProcessWorld, "begin_exchange", logged)

    def of_rank(world: ProcessWorld) -> list[str]:
        local.log, local.begun = [], 0
        bank = parts[world.rank][0].experts
        bank.register_forward_hook(lambda *_: local.log.append("experts"))
        bank.register_full_backward_hook(lambda *_: local.log.append("experts back"))
        layer, x_TD = parts[world.rank]
        sum(y.square().sum() for y in layer.moe(world)(x_TD).outputs).backward()
        return local.log

    logs = run_worlds(2, of_rank, options=ExchangeOptions(overlap_chunks=2))
    assert logs[0] == logs[1]
    forward = ["begin 1", "begin 2", "end 1", "experts", "begin 3", "end 2", "experts", "begin 4", "end 3", "end 4"]
    assert logs[0][: len(forward)] == forward
    backward = logs[0][len(forward) :]
    there = ["begin 5", "begin 6", "end 5", "experts back"]
    if learning:
        assert backward == [*there, "begin 7", "end 6", "experts back", "begin 8", "end 7", "end 8"]
    else:
        assert [entry for entry in backward if entry != "experts back"] == ["begin 5", "begin 6", "end 5", "end 6"]


def on_process(world: ProcessWorld, chunks: int) -> tuple[dict[str, Tensor], int]:
    world = ProcessWorld(world.group, options=ExchangeOptions(overlap_chunks=chunks))
    assert dist.get_backend() == "gloo"
    return step(shares_of(CASES["comet"], [7, 3])[world.rank], world)


def test_real_processes() -> None:
    flat, in_chunks = (on_real_worlds(2, on_process, chunks) for chunks in (1, 4))
    assert_same_steps(in_chunks, flat)
    assert all(size > 0 for _, size in flat)


def test_what_does_not_go_with_chunks_is_refused() -> None:
    both = ParallelConfig(expert_parallel_size=4, ranks_per_node=2, exchange="two_level", overlap_chunks=2)
    with pytest.raises(UserError, match=r"parallel.overlap_chunks=2 does not go with parallel.exchange=two_level"):
        both.check(4, 8)
    assert ParallelConfig(expert_parallel_size=4, overlap_chunks=2).ranks_per_level([[0, 0, 1, 1]]) is None
    with pytest.raises(ValueError, match="chunks=0"):
        OverlappedExchange(EmulatedWorld(2).ranks[0], 0)


@pytest.mark.parametrize("whole_bank", [False, True])
def test_parts_of_experts_are_the_experts(whole_bank: bool) -> None:
    """As pieces of the parameters, and as calls of the whole bank with no rows for the rest."""
    bank = build_layer(Case()).experts
    x_ND = torch.randn(9, 3, dtype=torch.float64)
    rows, sizes = [2, 0, 1, 0, 3, 0, 0, 3], [3, 1, 4]
    expected = bank(x_ND, rows)
    experts = (lambda x, counts: bank(x, counts)) if whole_bank else bank
    starts = [sum(sizes[:i]) for i in range(3)]
    counts = [rows[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    blocks = x_ND.split([sum(of_part) for of_part in counts])
    parts = parts_of(experts, sizes)
    actual = torch.cat([part(x, n) for part, x, n in zip(parts, blocks, counts, strict=True)])
    assert torch.equal(actual, expected)
    leaves = dict(bank.named_parameters())
    assert_all_same(gradients(actual.square().sum(), leaves), gradients(expected.square().sum(), leaves), 1e-13)
