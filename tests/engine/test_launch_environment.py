"""Rank and world size as launchers give them."""

from __future__ import annotations

import pytest
import torch

from dist_moe.engine.launch.environment import LaunchEnvironment


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
