"""An engine that is destroyed is gone, with its model and the threads of its process groups."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from tests.helpers.pool import on_ranks
from tests.helpers.toys import toy_engine


def what_remains(ep: int, stage: int) -> tuple[list[str], int]:
    """Objects that outlive their engine, and how many threads this process has then."""
    live: list[weakref.ref[Any]] = []
    _train(ep, stage, live)
    gc.collect()
    return [type(ref()).__name__ for ref in live if ref() is not None], len(list(Path("/proc/self/task").iterdir()))


def _train(ep: int, stage: int, live: list[weakref.ref[Any]]) -> None:
    adam = {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}}
    section = {"optimizer": adam, "zero_optimization": {"stage": stage}}
    with (
        process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ep)) as groups,
        toy_engine(groups, 4, **section) as engine,
    ):
        for _ in range(3):  # stage 3 keeps more from the second step on
            engine.backward(engine(1.0, [1.0, 2.0, 3.0, 4.0]))
            engine.step()
        live += [weakref.ref(engine), weakref.ref(engine.module), weakref.ref(engine.optimizer)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world_size", "ep"), [(1, 1), (2, 2)])
def test_nothing_remains(world_size: int, ep: int, stage: int) -> None:
    first, again = (on_ranks(world_size, what_remains, ep, stage) for _ in range(2))
    assert [names for names, _ in (*first, *again)] == [[]] * 2 * world_size
    for (_, before), (_, after) in zip(first, again, strict=True):
        assert after <= before
