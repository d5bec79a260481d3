"""Ranks that stay alive between tests: importing torch and DeepSpeed is most of what a short run costs."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import socket
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp

from dist_moe.tasks.language import samples

PATIENCE_S = 240.0
PRELOADED = [
    "dist_moe.recipes",
    # Imported at their first use:
    "matplotlib.figure",
    "scipy.stats",
    "torch._dynamo",  # by torch, with the first optimizer
    "tests.helpers.runs",
]


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on ``world_size`` processes; their results, in rank order.

    The processes are kept, and the next call finds them warm. Each call sees the environment that
    torchrun would give it. What goes wrong on a rank is raised here.
    """
    pool = _pool(world_size)
    try:
        return pool.run(function, arguments)
    except BaseException:
        pool.close()
        _pool.cache_clear()
        raise


@cache
def _pool(world_size: int) -> RankPool:
    return RankPool(world_size)


class RankPool:
    """``world_size`` processes that wait for functions to run together."""

    def __init__(self, world_size: int) -> None:
        context = _context()
        pipes = [context.Pipe() for _ in range(world_size)]
        self._connections: list[Connection] = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, world_size, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        port = free_port()
        for connection in self._connections:
            connection.send((port, function, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(self._connections):
            waiting = {id(c): rank for rank, c in enumerate(self._connections) if rank not in results}
            ready = wait([self._connections[rank] for rank in waiting.values()], PATIENCE_S)
            if not ready:
                raise TimeoutError(f"{function.__name__}: {len(waiting)} rank(s) gave no answer in {PATIENCE_S} s")
            for answered in ready:
                rank = waiting[id(answered)]
                results[rank] = self._answer(rank)
        return [results[rank] for rank in range(len(self._connections))]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _answer(self, rank: int) -> Any:
        try:
            failure, result = self._connections[rank].recv()
        except EOFError:
            raise AssertionError(f"rank {rank} died") from None
        if failure is not None:
            raise AssertionError(f"rank {rank} failed:\n{failure}")
        return result


def _context() -> Any:
    """Ranks that are forks of one process which has imported everything; a GPU does not survive a fork."""
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    """A local port on which nothing listens, below those that Linux gives to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def _serve(rank: int, world_size: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    samples.NEW_TOKENS = 6  # that language models write at the end of a run: each takes all ranks a pass
    gc.freeze()  # what is imported stays: the collections below need not look at it
    while True:
        try:
            port, function, arguments = connection.recv()
        except EOFError:
            return
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            connection.send((None, function(*arguments)))
        except BaseException:
            connection.send((traceback.format_exc(), None))
        del function, arguments
        gc.collect()  # engines are cycles, which hold the threads and sockets of the groups that they used
