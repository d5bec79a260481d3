"""Emulated ranks: the bits of real ones, their errors, their random numbers, the caller's modes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dist_moe.experts import DenseReLUBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.parallel import (
    EmulatedWorld,
    ProcessWorld,
    World,
    current_world,
    experts_of_rank,
    several_ranks,
    sum_over_ranks,
)
from tests.helpers.worlds import in_nodes, on_real_worlds
from tests.parallel.emulated_cases import TOKENS, train_on_rank


def layer(world: World | None = None) -> MoE:
    torch.manual_seed(5)
    experts = experts_of_rank(8, world) if world else range(8)
    return MoE(TopK(3, 8, k=2), DenseReLUBank(3, 4, 8, experts), world=world)


def rows_to_next(world: World, x_ND: Tensor) -> Tensor:
    """Every rank's rows on the next rank."""
    send, receive = [0] * world.size, [0] * world.size
    send[(world.rank + 1) % world.size] = receive[(world.rank - 1) % world.size] = len(x_ND)
    return world.all_to_all(x_ND, send, receive)


def assert_same_bits(emulated: list[dict[str, Any]], real: list[dict[str, Any]]) -> None:
    for rank, (ours, theirs) in enumerate(zip(emulated, real, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array, err_msg=f"rank {rank}: {name}")


@pytest.mark.parametrize(("gate", "skewed"), [("comet", False), ("top_k", False), ("comet", True)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_training_has_every_bit_of_real_ranks(size: int, gate: str, skewed: bool) -> None:
    """Dropout, noise, global statistics, learnt permutation and optimiser included; a rank without tokens, too."""
    real = on_real_worlds(size, train_on_rank, gate, skewed)
    emulated = EmulatedWorld(size).run(lambda world: train_on_rank(world, gate, skewed))
    assert_same_bits(emulated, real)
    assert np.abs(real[0]["2 grad experts.weight"]).max() > 0
    draws = {tuple(results["random"]) for results in real}
    assert len(draws) == len(set(TOKENS[:size])), "as many rows dropped, as many numbers drawn"


def train_in_nodes(world: ProcessWorld, ranks_per_node: int, gate: str) -> dict[str, Any]:
    return train_on_rank(in_nodes(world, ranks_per_node), gate, False)


@pytest.mark.parametrize(("size", "ranks_per_node", "gate"), [(2, 1, "comet"), (4, 2, "comet"), (4, 2, "top_k")])
def test_training_in_nodes_has_every_bit_of_real_ranks(size: int, ranks_per_node: int, gate: str) -> None:
    """By the two-level exchange, and the traffic between nodes, too."""
    real = on_real_worlds(size, train_in_nodes, ranks_per_node, gate)
    emulated = EmulatedWorld(size, ranks_per_node=ranks_per_node)
    assert_same_bits(emulated.run(lambda world: train_on_rank(world, gate, False)), real)
    assert real[0]["traffic"]["bytes_across_nodes"] > 0
    flat = EmulatedWorld(size).run(lambda world: train_on_rank(world, gate, False))
    assert flat[0]["traffic"]["bytes"] != real[0]["traffic"]["bytes"]


def test_an_error_in_a_part_names_its_ranks() -> None:
    def disagree(world: World) -> None:
        assert world.levels is not None
        within = world.levels.within
        within.all_to_all(torch.zeros(2, 1), [1, 1], [1, 2 if world.rank == 3 else 1])

    with pytest.raises(RuntimeError, match=r"rank 1 expects \[1, 2\] rows") as error:
        EmulatedWorld(4, ranks_per_node=2).run(disagree)
    assert "within a node, among the ranks [2, 3]" in error.value.__notes__


def test_other_levels_at_the_same_time_are_an_error() -> None:
    def mix(world: World) -> None:
        assert world.levels is not None
        (world.levels.within if world.rank < 2 else world.levels.across).sum(torch.ones(1))

    with pytest.raises(RuntimeError, match=r"\(1,\) within a node; ranks \[2, 3\] .* across nodes"):
        EmulatedWorld(4, ranks_per_node=2).run(mix)


def test_nodes_are_alike() -> None:
    for ranks_per_node in (0, 3, 8):
        with pytest.raises(ValueError, match=f"ranks_per_node={ranks_per_node} does not divide the 4 ranks"):
            EmulatedWorld(4, ranks_per_node=ranks_per_node)


def test_ranks_take_turns_and_rank_0_is_first() -> None:
    order: list[int] = []

    def note(world: World) -> None:
        for _ in range(3):
            order.append(world.rank)
            time.sleep(0.001 * (3 - world.rank))
            world.sum(torch.ones(1))

    EmulatedWorld(4).run(note)
    assert order == [0, 1, 2, 3] * 3


def test_losses_of_a_run_are_derived_in_the_next() -> None:
    x_RTD = torch.randn(4, 6, 3)
    emulated = EmulatedWorld(4)
    layers = [layer(world) for world in emulated.ranks]
    losses = emulated.run(lambda world: layers[world.rank](x_RTD[world.rank]).outputs[0].square().sum())
    emulated.backward(losses)
    whole = layer()
    whole(x_RTD.flatten(0, 1)).outputs[0].square().sum().backward()
    torch.testing.assert_close(
        torch.cat([moe.experts.weight.grad for moe in layers]), whole.experts.weight.grad, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="1 losses for 4 ranks"):
        emulated.backward(losses[:1])


def test_a_shared_gate_gets_the_gradients_of_all_ranks() -> None:
    x_RTD, emulated, shared = torch.randn(4, 6, 3), EmulatedWorld(4), layer().gates[0]
    copies = [deepcopy(shared) for _ in range(4)]

    def backward(world: World, gate: TopK) -> None:
        share = layer(world)
        share.gates[0] = gate
        share(x_RTD[world.rank]).outputs[0].square().sum().backward()

    emulated.run(lambda world: backward(world, shared))
    emulated.run(lambda world: backward(world, copies[world.rank]))
    total = sum(gate.weight.grad for gate in copies)
    assert total.abs().max() > 0
    torch.testing.assert_close(shared.weight.grad, total)


def test_rows_are_recomputed_in_the_backward_pass_under_checkpointing() -> None:
    x_RTD = torch.randn(3, 4, 2)

    def gradient(world: World, checkpointed: bool) -> Tensor:
        def run(x_TD: Tensor) -> Tensor:
            return rows_to_next(world, x_TD.exp()).square()

        x_TD = x_RTD[world.rank].clone().requires_grad_()
        y_TD = checkpoint(run, x_TD, use_reentrant=False) if checkpointed else run(x_TD)
        y_TD.sum().backward()
        return x_TD.grad

    plain, again = (EmulatedWorld(3).run(lambda world, c=c: gradient(world, c)) for c in (False, True))
    assert torch.equal(torch.stack(plain), torch.stack(again))


def test_what_was_brought_may_be_altered_at_once() -> None:
    def spoil(world: World) -> list[Tensor]:
        results = []
        for exchange in (lambda x: rows_to_next(world, x), world.sum, world.broadcast, lambda x: world.gather(x)[1]):
            mine = torch.full((2, 1), float(world.rank))
            results.append(exchange(mine))
            mine.fill_(torch.nan)
        return results

    for rank, results in enumerate(EmulatedWorld(3).run(spoil)):
        expected = [(rank - 1) % 3, 3, 0, 1]
        assert [x.flatten().tolist() for x in results] == [[float(value)] * 2 for value in expected]


@pytest.mark.parametrize("guilty", [0, 1, 2])
@pytest.mark.parametrize("when", ["first", "forward", "backward", "last"])
def test_an_error_on_one_rank_ends_all_and_is_raised(guilty: int, when: str) -> None:
    ended: list[int] = []
    generator = torch.get_rng_state()

    def run(world: World) -> None:
        def maybe_fail(now: str) -> None:
            if (world.rank, now) == (guilty, when):
                raise KeyError("mine")

        try:
            maybe_fail("first")
            x_ND = torch.ones(1, 1, requires_grad=True)
            received = rows_to_next(world, x_ND)
            maybe_fail("forward")
            received.register_hook(lambda _: maybe_fail("backward"))
            rows_to_next(world, received).sum().backward()
            maybe_fail("last")
            world.sum(torch.ones(1))
        finally:
            ended.append(world.rank)
            world.sum(torch.ones(1)) if world.rank != guilty else None

    with pytest.raises(KeyError, match="mine") as raised:
        EmulatedWorld(3, deadline_s=20).run(run)
    assert raised.value.__notes__ == [f"on emulated rank {guilty} of 3"]
    started = {0, 1, 2} if when != "first" else set(range(guilty + 1))
    assert sorted(ended) == sorted(started)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]
    assert torch.equal(torch.get_rng_state(), generator)
    assert not several_ranks()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda world: world.rank == 1 or world.sum(torch.ones(2)),
            r"ranks \[0, 2\] are at sum of torch.float32 of shape \(2,\); ranks \[1\] are at the end of their",
        ),
        (
            lambda world: world.rank == 2 or world.sum(torch.ones(2)),
            r"ranks \[0, 1\] are at sum .*; ranks \[2\] are at the end of their",
        ),
        (
            lambda world: world.sum(torch.ones(2 + (world.rank == 1))),
            r"ranks \[0, 2\] are at sum of torch.float32 of shape \(2,\); ranks \[1\] are at sum .* \(3,\)",
        ),
        (
            lambda world: (world.sum if world.rank else world.broadcast)(torch.ones(2)),
            r"ranks \[0\] are at broadcast .*; ranks \[1, 2\] are at sum",
        ),
        (
            lambda world: world.all_to_all(torch.ones(3, 1), [1, 1, 1], [1, 1, 1 + (world.rank == 1)]),
            r"rank 1 expects \[1, 1, 2\] rows of the ranks, but they send \[1, 1, 1\]",
        ),
        (
            lambda world: world.all_to_all(torch.ones(3, 1), [1, 1, 2], [1, 1, 2]),
            "split",
        ),
    ],
)
def test_ranks_that_do_not_meet_are_named_at_once(function: Callable[[World], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        EmulatedWorld(3, deadline_s=None).run(function)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_rank_that_never_arrives_is_named_with_its_place(lost: int) -> None:
    released, ended = threading.Event(), []

    def wait_for_something_else(world: World) -> None:
        try:
            world.sum(torch.ones(1))
            if world.rank == lost:
                released.wait(60)
            world.sum(torch.ones(1))
        finally:
            ended.append(world.rank)

    emulated = EmulatedWorld(3, deadline_s=4.0)
    with pytest.raises(TimeoutError, match=rf"(?s)rank {lost} ran for 4.0 s .*wait_for_something_else.*released.wait"):
        emulated.run(wait_for_something_else)
    assert sorted(ended) == [rank for rank in range(3) if rank != lost]
    assert emulated.run(lambda world: world.sum(torch.ones(1)).item()) == [3, 3, 3]
    # It comes back while the ranks are running anew: it ends, and does not take part.
    (zombie,) = [thread for thread in threading.enumerate() if thread.name == f"rank {lost}"]

    def run_anew(world: World) -> float:
        released.set()
        zombie.join(10)
        return world.sum(torch.ones(1)).item()

    assert emulated.run(run_anew) == [3, 3, 3]
    assert sorted(ended) == [0, 1, 2]


def test_an_interruption_of_the_caller_ends_all_ranks() -> None:
    ended: list[int] = []
    caller = threading.get_ident()

    def interrupt(world: World) -> None:
        try:
            for lap in range(1000):
                if world.rank == 1 and lap == 1:  # all ranks have begun
                    signal.pthread_kill(caller, signal.SIGINT)
                    time.sleep(0.5)  # the caller has long gone on, if it does not wait
                world.sum(torch.ones(1))
        finally:
            ended.append(world.rank)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            EmulatedWorld(3).run(interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(ended) == [0, 1, 2]


def test_a_deadline_counts_a_turn_and_not_the_run() -> None:
    def slow(world: World) -> float:
        for _ in range(4):
            time.sleep(0.3)
            total = world.sum(torch.ones(1)).item()
        return total

    assert EmulatedWorld(4, deadline_s=4.0).run(slow) == [4] * 4


def test_every_rank_has_random_numbers_of_its_own() -> None:
    def draw(world: World, seed: int | None) -> list[Tensor]:
        if seed is not None:
            torch.manual_seed(seed + world.rank)
        drawn = []
        for _ in range(3):
            drawn.append(torch.rand(1 + world.rank))
            world.sum(torch.ones(1))
        return drawn

    for seed in (None, 7):
        torch.manual_seed(11)
        of_ranks = EmulatedWorld(4).run(lambda world, seed=seed: draw(world, seed))
        following = torch.rand(2)
        for rank, drawn in reversed(list(enumerate(of_ranks))):
            torch.manual_seed(11 if seed is None else seed + rank)
            assert torch.equal(torch.cat(drawn), torch.cat([torch.rand(1 + rank) for _ in range(3)]))
        assert torch.equal(following, torch.rand(2)), "the caller goes on where rank 0 ended"


def test_ranks_have_the_modes_of_the_caller() -> None:
    def modes(world: World) -> list[bool]:
        world.sum(torch.ones(1))
        return [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")]

    emulated = EmulatedWorld(2)
    assert emulated.run(modes) == [[True, False, False]] * 2
    with torch.no_grad():
        assert emulated.run(modes) == [[False, False, False]] * 2
    with torch.inference_mode():
        assert emulated.run(modes) == [[False, True, False]] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert emulated.run(modes) == [[True, False, True]] * 2
        products = emulated.run(lambda world: torch.ones(2, 2) @ torch.ones(2, 2))
    assert products[1].dtype == torch.bfloat16


def test_the_current_world_is_the_emulated_one_within_and_only_there() -> None:
    def where(world: World) -> tuple[int, int, float]:
        assert current_world() is world
        inner = EmulatedWorld(2).run(lambda inside: (current_world() is inside, sum_over_ranks(torch.ones(1)).item()))
        assert inner == [(True, 2)] * 2
        assert current_world() is world
        return current_world().rank, current_world().size, sum_over_ranks(torch.ones(1)).item()

    assert EmulatedWorld(3).run(where) == [(0, 3, 3), (1, 3, 3), (2, 3, 3)]
    assert current_world().size == 1
    assert not several_ranks()


def test_what_is_called_in_the_wrong_place_is_explained() -> None:
    emulated = EmulatedWorld(2)
    layers = [layer(world) for world in emulated.ranks]
    x_TD = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"rank 1 outside its own function: call layers within EmulatedWorld\.run"):
        layers[1](x_TD)
    with pytest.raises(RuntimeError, match="rank 1 outside its own function"):
        emulated.run(lambda world: layers[1](x_TD))
    layers = [layer(world) for world in emulated.ranks]  # each looks at its experts once, in a collective
    losses = emulated.run(lambda world: layers[world.rank](x_TD).outputs[0].sum())
    with pytest.raises(RuntimeError, match=r"outside its own function.*losses' backward\(\) there or by"):
        sum(losses).backward()
    with pytest.raises(ValueError, match="size=0: an emulated world has at least one rank"):
        EmulatedWorld(0)


def test_a_copy_of_a_layer_is_on_its_rank() -> None:
    emulated = EmulatedWorld(2)
    layers = [layer(world) for world in emulated.ranks]
    copies = deepcopy(layers)
    x_TD = torch.randn(4, 3)
    outputs = [emulated.run(lambda world, of=of: of[world.rank](x_TD).outputs[0]) for of in (layers, copies)]
    assert torch.equal(*(torch.stack(of) for of in outputs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_backward_on_a_gpu_does_not_wait_for_itself() -> None:
    """Autograd has one thread per GPU: if ranks used it, the first would keep the others from coming."""
    x_RTD = torch.randn(4, 6, 3)

    def gradients(world: World, device: str) -> list[Tensor]:
        moe = layer(world).to(device)
        torch.manual_seed(world.rank)
        moe(x_RTD[world.rank].to(device)).outputs[0].square().sum().backward()
        return [moe.experts.weight.grad.cpu(), torch.rand(3, device=device).cpu()]

    emulated = EmulatedWorld(4, deadline_s=60)
    on_cpu, on_gpu = (emulated.run(lambda world, d=d: gradients(world, d)) for d in ("cpu", "cuda"))
    for rank in range(4):
        torch.testing.assert_close(on_gpu[rank][0], on_cpu[rank][0], rtol=1e-3, atol=1e-4)
        torch.cuda.manual_seed(rank)
        assert torch.equal(on_gpu[rank][1], torch.rand(3, device="cuda").cpu())
