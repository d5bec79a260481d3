"""Masters, moments and Adam's step, brought from one engine into another that shards them otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from dist_moe.engine.deepspeed.parameter_state import read_parameter_state, write_parameter_state
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from tests.helpers.parity import STEPS, Cell, Numbers, engine_of, masters_of, reference, take_step
from tests.helpers.pool import on_ranks


def continued(first: Cell, then: Cell) -> tuple[Numbers, dict[str, float], int, int]:
    """All steps but the last by one engine, the last by another; masters, scalars, and how many tensors the
    optimizer of the second owns and how many different ones hold Adam's step."""
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=first.ep)) as groups:
        engine = engine_of(first, groups)
        for step in range(STEPS - 1):
            take_step(engine, first, step)
        state = read_parameter_state(engine)
        engine.destroy()
        engine = engine_of(then, groups)
        write_parameter_state(engine, state)
        take_step(engine, then, STEPS - 1)
        result = masters_of(engine), read_parameter_state(engine).scalars, *_steps_of(engine)
        engine.destroy()
        return result


def _steps_of(engine: Any) -> tuple[int, int]:
    inner = engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer
    states = inner.state.values()
    return len(states), len({id(state["step"]) for state in states})


@pytest.mark.parametrize(("before", "after"), [(3, 3), (1, 3), (3, 0)])
@pytest.mark.parametrize(("ranks", "ep"), [(1, 1), (2, 2)])
def test_the_last_step_is_the_same(ranks: int, ep: int, before: int, after: int) -> None:
    """Every tensor of the optimizer counts its own steps: with a shared count, n of them would make n of one step."""
    cells = (Cell(ranks, ep, before, clipping=True), Cell(ranks, ep, after, clipping=True))
    for masters, scalars, owned, counts in on_ranks(ranks, continued, *cells):
        assert counts == owned > 1
        assert scalars == {"step": STEPS}
        wanted = reference(clipping=True).masters
        assert [name for name, tensor in masters.items() if (tensor - wanted[name]).abs().max() > 1e-5] == []
