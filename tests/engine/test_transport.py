"""What tensors travel by, and that every group of a GPU node takes host tensors and the run's own timeout."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch import transport
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.machine_probe import open_group
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.engine.launch.transport import agree_on_transport, choose_transport
from dist_moe.errors import LaunchError
from dist_moe.parallel import Placement, gather_objects, max_over_ranks, sum_over_ranks, wait_for_all
from dist_moe.search import agree_on_placement
from tests.helpers.commands import Outcome, run_here
from tests.helpers.pool import on_ranks
from tests.helpers.runs import records_of, write_config

BOTH = "cpu:gloo,cuda:nccl"


def agreed(monkeypatch: pytest.MonkeyPatch, gpus_of_rank: list[list[str]], per_node: int) -> list[Any]:
    """What each of several ranks, which see these GPUs, gets: a transport or an error."""
    here = threading.local()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus_of_rank[here.rank]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus_of_rank[here.rank]))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=gpus_of_rank[here.rank][device.index])
    )
    store, size = dist.HashStore(), len(gpus_of_rank)

    def of(rank: int) -> Any:
        here.rank = rank
        environment = LaunchEnvironment(rank, size, rank % per_node, launched=True, local_world_size=per_node)
        try:
            return agree_on_transport(environment, store)
        except LaunchError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of, range(size)))


@pytest.mark.parametrize(
    ("gpus_of_rank", "per_node", "backend", "why"),
    [
        ([["a"], ["b"], ["c"], ["d"]], 4, BOTH, "each of the 4 rank(s) has its own GPU"),  # --gpus-per-task=1
        ([["a", "b"], ["a", "b"]], 2, BOTH, "its own GPU"),
        ([["a", "b"], ["a", "b"], ["c", "d"], ["c", "d"]], 2, BOTH, "each of the 4"),
        ([["a"]], 1, BOTH, "its own GPU"),
        ([["a"], ["a"]], 2, "gloo", "ranks 0, 1 share the GPU a, which NCCL refuses"),
        ([["a", "b"]] * 4, 4, "gloo", "ranks 0, 2 share the GPU a"),
        ([["a"], ["b"], ["b"]], 3, "gloo", "ranks 1, 2 share the GPU b"),
        ([[], []], 2, "gloo", "no rank has a GPU"),
    ],
)
def test_ranks_with_a_gpu_each_exchange_over_nccl(
    monkeypatch: pytest.MonkeyPatch, gpus_of_rank: list[list[str]], per_node: int, backend: str, why: str
) -> None:
    for one in agreed(monkeypatch, gpus_of_rank, per_node):
        assert one.backend == backend
        assert why in one.why


def test_some_ranks_without_a_gpu_are_an_error_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in agreed(monkeypatch, [["a"], [], ["b"]], 3):
        assert isinstance(error, LaunchError)
        assert "rank(s) 1 see no GPU, 2 other(s) do" in str(error)


def test_a_long_list_of_ranks_is_cut() -> None:
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... share" in choose_transport(["a"] * 100).why


STAND_IN = "stand_in"


def _stand_in(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


@contextmanager
def as_on_a_gpu_node() -> Iterator[None]:
    """Each rank believes that it has a GPU of its own, over which a backend for CUDA tensors alone exchanges.

    And nobody may pickle an object for others, DeepSpeed neither.
    """
    if STAND_IN not in dist.Backend.backend_list:
        dist.Backend.register_backend(STAND_IN, _stand_in, devices=["cuda"])
    with (
        mock.patch.multiple(transport, GPU_BACKEND=STAND_IN, _identity=lambda _: f"GPU-{os.getpid()}"),
        mock.patch.object(distributed_c10d, "_object_to_tensor", side_effect=AssertionError("an object is pickled")),
    ):
        yield


def groups_of_this_rank() -> dict[str, dist.ProcessGroup]:
    return {name: group for group, name in distributed_c10d._world.pg_names.items()}


def use_all_groups(stage: int, levels: bool) -> dict[str, tuple[str, float]]:
    """Open every kind of group; the backends' device and timeout in seconds of each."""
    options = {"exchange": "two_level", "ranks_per_node": 1} if levels else {}
    config = ParallelConfig(expert_parallel_size=2, timeout_s=77, stall_s=0, **options)  # type: ignore[arg-type]
    with as_on_a_gpu_node(), process_groups(LaunchEnvironment.read(), config) as groups:
        assert groups.transport.startswith("NCCL: each of the 2 rank(s)")
        section: dict[str, Any] = {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": stage},
        }
        engine = ExpertParallelEngine(nn.Linear(3, 3), complete_deepspeed_section(section, 2, 2), groups)
        open_group([0, 1], groups.timeout)
        # What the host knows, over groups that serve devices: placement, agreement, records, checkpoints.
        assert agree_on_placement(Placement((1, 0), 2)) == Placement((1, 0), 2)
        assert gather_objects({"rank": groups.environment.rank})[1] == {"rank": 1}
        assert sum_over_ranks(torch.ones(2)).tolist() == [2.0, 2.0]
        assert max_over_ranks(torch.ones(2)).tolist() == [1.0, 1.0]
        assert groups.world.exchange(torch.ones(2, 1), [1, 1], [1, 1]).tolist() == [[1.0], [1.0]]
        wait_for_all()
        found = {}
        for name, group in groups_of_this_rank().items():
            for device in ("cpu", "cuda"):
                backend = group._get_backend(torch.device(device))
                found[f"{name} {device}"] = type(backend).__name__, backend.options._timeout.total_seconds()
        engine.destroy()
        return found


@pytest.mark.parametrize(("stage", "levels"), [(0, False), (1, True), (2, False), (3, True)])
def test_every_group_serves_host_and_device_and_has_the_timeout_of_the_run(stage: int, levels: bool) -> None:
    for found in on_ranks(2, use_all_groups, stage, levels):
        assert len(found) >= 8
        assert set(found.values()) == {("ProcessGroupGloo", 77.0)}


def train_as_on_a_gpu_node(arguments: list[str]) -> Outcome:
    with as_on_a_gpu_node():
        return run_here(arguments)


def test_a_whole_run_with_placement_over_such_groups(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    config = write_config(
        tmp_path,
        tiny_data,
        train={"max_steps": 8, "log_every": 2, "checkpoint_every": 4},
        placement={"every_steps": 4, "window": 2},
    )
    arguments = ["train", str(config), "--run-dir", str(tmp_path / "run"), "parallel.expert_parallel_size=2"]
    outcomes: list[Outcome] = on_ranks(2, train_as_on_a_gpu_node, arguments)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    assert "ranks exchange over NCCL: each of the 2 rank(s) has its own GPU" in outcomes[0].err
    assert len(records_of(tmp_path / "run")) == 8
