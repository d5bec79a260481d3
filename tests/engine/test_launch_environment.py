"""Rank and world size as launchers give them."""

from __future__ import annotations

import pytest

from dist_moe.engine.launch_environment import LaunchEnvironment


def test_without_a_launcher() -> None:
    environment = LaunchEnvironment.read()
    assert (environment.rank, environment.world_size, environment.launched) == (0, 1, False)
    assert environment.is_first


@pytest.mark.parametrize(("rank", "world_size", "local_rank"), [(0, 1, 0), (1, 2, 1), (5, 8, 1)])
def test_with_one(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, local_rank: int) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    environment = LaunchEnvironment.read()
    assert environment == LaunchEnvironment(rank, world_size, local_rank, launched=True)
    assert environment.is_first == (rank == 0)
