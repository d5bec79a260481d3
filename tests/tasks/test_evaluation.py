"""Evaluation is the same on one process and on ranks that share experts and examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from dist_moe.recipes.recipe import plan_new_run
from dist_moe.recipes.supervised.recipe import SupervisedPlan
from dist_moe.tasks import build_model
from dist_moe.tasks.evaluation import evaluate
from tests.helpers.runs import write_config


def metrics_on(world: World, plan: SupervisedPlan) -> dict[str, Any]:
    groups = ProcessGroups(LaunchEnvironment(), world.size, world)
    model = build_model(plan.config, plan.task, world)
    return evaluate(plan.task, model, plan.task.test, (0.5, 0.5), groups)


@pytest.mark.parametrize(("size", "ranks_per_node"), [(2, None), (4, 2)])
def test_emulated_ranks_find_the_metrics_of_one_process(
    tiny_data: dict[str, str], tmp_path: Path, size: int, ranks_per_node: int | None
) -> None:
    config = write_config(tmp_path, tiny_data, model={"num_experts": 8})
    plan = plan_new_run(config, [], tmp_path / "unused")
    expected = metrics_on(SingleWorld(), plan)
    assert expected["active_experts"] > 0
    emulated = EmulatedWorld(size, ranks_per_node=ranks_per_node)
    for metrics in emulated.run(lambda world: metrics_on(world, plan)):
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
