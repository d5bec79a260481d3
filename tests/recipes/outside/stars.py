"""A module of somebody else: a task whose data are made of a file, in memory, and a recipe; both know no digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dist_moe.data.batches import Table
from dist_moe.models import ModelOutput
from dist_moe.recipes import RECIPES
from dist_moe.recipes.stages import Stage, StagedPlan, StagedRecipe, Stages
from dist_moe.recipes.supervised.recipe import feed_of, weighted_objective
from dist_moe.tasks import TASKS, Task, TaskSettings, build_model


class StarsTask(Task):
    kind = "recommendation"

    def __init__(self, path: Path) -> None:
        rows = torch.tensor([[int(number) for number in row.split(",")] for row in path.read_text().split()])
        user_N, item_N, stars_N = rows.T
        self.train, self.val, self.test = Table((user_N, item_N), stars_N).split(0.8, 0.9)
        self._users, self._items = int(user_N.max()) + 1, int(item_N.max()) + 1

    def model_inputs(self) -> dict[str, Any]:
        return {"num_users": self._users, "num_items": self._items, "num_targets": 1}

    def task_losses(self, output: ModelOutput, batch: Any) -> dict[str, Tensor]:
        return {"mse": self.observe(output, batch).sum().float() / batch.examples_in_step}

    def observe(self, output: ModelOutput, batch: Any) -> Tensor:
        return (output.predictions[0].double() - batch.target_B).square().unsqueeze(0)

    def metrics(self, columns: Any, part: Any, weights: tuple[float, ...]) -> dict[str, float]:
        return {"loss": weights[0] * float(columns.mean())}


@TASKS.register
class StarsSettings(TaskSettings):
    kind: ClassVar[str] = "recommendation"
    target_names: ClassVar[tuple[str, ...]] = ("stars",)
    name: Literal["stars"] = "stars"
    root: Path

    def open(self, *, progress: bool) -> StarsTask:
        return StarsTask(self.root)


@RECIPES.register
class InTwoStages(StagedRecipe):
    name: Literal["in_two"] = "in_two"

    def result_of(self, root: Path) -> Path:
        return root / "stages" / "second"

    def run(self, plan: StagedPlan, stages: Stages) -> None:
        for name in ("first", "second"):
            stages.run(name, lambda stage: self._train(plan, stage))

    def _train(self, plan: StagedPlan, stage: Stage) -> None:
        config, task = plan.start.config, plan.task
        model = build_model(config, task, stage.groups.world)
        objective = weighted_objective(config, task, stage.groups)
        stage.fit(model, feed_of(config, task, stage.environment), objective, config.train)
