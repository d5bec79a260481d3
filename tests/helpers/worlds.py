"""Worlds of several ranks: real processes, and threads over torch's threaded process group.

That group is a private part of torch, for tests of ``ProcessWorld``. What does not need ``torch.distributed``
itself uses ``EmulatedWorld``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.parallel import (
    EmulatedWorld,
    ExchangeOptions,
    ProcessWorld,
    Traffic,
    World,
    current_world,
    open_levels,
)
from tests.helpers.pool import on_ranks

Result = TypeVar("Result")
RunOnRanks = Callable[[int, Callable[[World], Any]], list[Any]]
DEADLINE_S = 10.0


def run_worlds(
    num_ranks: int,
    function: Callable[[ProcessWorld], Result],
    deadline_s: float = DEADLINE_S,
    *,
    options: ExchangeOptions | None = None,
) -> list[Result]:
    """``function(world)`` on every rank at once; the results in rank order.

    An exception on one rank ends them all and is raised here; so is a rank that never comes back.
    Draw no random numbers in ``function``: the generator is shared.
    """
    store = dist.HashStore()
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def rank_main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=num_ranks, store=store)
            assert dist.group.WORLD is not None
            results[rank] = function(ProcessWorld(dist.group.WORLD, options=options))
        except SystemExit:
            pass  # another rank has failed
        except BaseException as error:
            errors[rank] = error
            threaded.ProcessLocalGroup.exception_handle(error)

    with _threaded_groups():
        threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(num_ranks)]
        for thread in threads:
            thread.start()
        if hanging := _join(threads, deadline_s):
            errors[num_ranks] = TimeoutError(f"ranks {hanging} hang")
            threaded.ProcessLocalGroup.exception_handle(errors[num_ranks])
            _join(threads, DEADLINE_S)
    if errors:
        raise errors[min(errors)]
    return [results[rank] for rank in range(num_ranks)]


def on_real_worlds(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` on ``size`` gloo processes over which the experts are split."""
    return on_ranks(size, _on_process, function, arguments)


def _on_process(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    environment = LaunchEnvironment.read()
    with process_groups(environment, ParallelConfig(expert_parallel_size=environment.world_size)) as groups:
        assert current_world().size == groups.world.size == environment.world_size
        return function(groups.world, *arguments)


def emulate(
    num_ranks: int, function: Callable[[World], Result], *, options: ExchangeOptions | None = None
) -> list[Result]:
    """``function(world)`` on every emulated rank; the results in rank order."""
    return EmulatedWorld(num_ranks, DEADLINE_S, options=options).run(function)


both_kinds = pytest.mark.parametrize("run", [run_worlds, emulate], ids=["torch_distributed", "emulated"])
"""``run(num_ranks, function, options=None)``: what every world promises."""


def processes_in_nodes(ranks_per_node: int) -> RunOnRanks:
    """``run(num_ranks, function)`` on ranks of torch.distributed, divided into nodes."""
    return lambda num_ranks, function: run_worlds(num_ranks, lambda world: function(in_nodes(world, ranks_per_node)))


def emulated_in_nodes(ranks_per_node: int) -> RunOnRanks:
    """The same on emulated ranks."""
    return lambda num_ranks, function: EmulatedWorld(num_ranks, DEADLINE_S, ranks_per_node=ranks_per_node).run(function)


both_kinds_in_nodes = pytest.mark.parametrize(
    "in_nodes_of", [processes_in_nodes, emulated_in_nodes], ids=["torch_distributed", "emulated"]
)
"""``in_nodes_of(ranks_per_node)``: what all ranks promise that are divided into nodes."""


def in_nodes(world: ProcessWorld, ranks_per_node: int) -> ProcessWorld:
    """``world``, whose ranks are all ranks of the job, divided into nodes. Collective."""
    nodes, traffic = [rank // ranks_per_node for rank in range(world.size)], Traffic()
    levels = open_levels([range(world.size)], ranks_per_node, traffic, world.options)
    return ProcessWorld(world.group, nodes, traffic, levels=levels, options=world.options)


def _join(threads: list[threading.Thread], deadline_s: float) -> list[int]:
    """Wait for all threads until the deadline; the ranks of those that are still alive then."""
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return [rank for rank, thread in enumerate(threads) if thread.is_alive()]


@contextmanager
def _threaded_groups() -> Iterator[None]:
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded.ProcessLocalGroup.reset()
    threaded._install_threaded_pg()
    try:
        yield
    finally:
        threaded._uninstall_threaded_pg()
        threaded.ProcessLocalGroup.reset()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
