"""Rank, world size and ranks per node as launchers give them; freed memory that is used again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from dist_moe.engine.launch.environment import LaunchEnvironment, launched_ranks_per_node
from dist_moe.errors import UserError

PROGRAM = """
import resource, sys, torch
from dist_moe.engine.launch.environment import disable_malloc_trim

if sys.argv[1] == "no trim":
    assert disable_malloc_trim()
def step():
    tensors = [torch.ones(16 * 2**20) for _ in range(4)]  # 64 MiB each: above what glibc keeps by itself
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_without_a_launcher() -> None:
    environment = LaunchEnvironment.read()
    assert (environment.rank, environment.world_size, environment.launched) == (0, 1, False)
    assert environment.is_rank_zero


@pytest.mark.parametrize(("rank", "world_size", "local_rank"), [(0, 1, 0), (1, 2, 1), (5, 8, 1)])
def test_with_one(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, local_rank: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    environment = LaunchEnvironment.read()
    assert environment == LaunchEnvironment(rank, world_size, local_rank, launched=True)
    assert environment.is_rank_zero == (rank == 0)


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
@pytest.mark.parametrize(
    ("ranks", "gpus", "backend"), [(1, 0, "gloo"), (2, 0, "gloo"), (1, 1, "nccl"), (2, 1, "gloo"), (2, 2, "nccl")]
)
def test_what_ranks_that_share_a_gpu_exchange_over(
    monkeypatch: pytest.MonkeyPatch, name: str, ranks: int, gpus: int, backend: str
) -> None:
    for variable, value in {"RANK": ranks - 1, "WORLD_SIZE": ranks, "LOCAL_RANK": ranks - 1, name: ranks}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert LaunchEnvironment.read().backend == backend


def test_ranks_per_node_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched_ranks_per_node() is None
    monkeypatch.setenv("LOCAL_SIZE", "3")
    assert launched_ranks_per_node() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched_ranks_per_node() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "none")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE='none' is not a number of ranks"):
        launched_ranks_per_node()


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own tuning")
def test_a_step_faults_its_memory_in_only_once() -> None:
    kept = min(page_faults("no trim") for _ in range(3))  # the kernel may take pages away meanwhile
    assert kept * 4 < page_faults("as it is")
