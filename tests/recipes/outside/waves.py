"""A module of somebody else's: a gate, an expert, a model, a data set, a task, a callback, a tracker and a recipe."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dist_moe import record
from dist_moe.data.batches import ExampleBatch
from dist_moe.engine.callbacks import CALLBACKS, Callback, CallbackSettings
from dist_moe.engine.checkpoint import newest_checkpoint, place_weights, read_model
from dist_moe.engine.monitor.trackers import TRACKERS, Say, Tracker, TrackerSettings
from dist_moe.engine.training import Trainer
from dist_moe.experts import EXPERTS, ExpertBank, ExpertSettings
from dist_moe.gates import GATES, Gate, GateContext, GateSettings, Mixture
from dist_moe.kernels import RowCounts, grouped_linear
from dist_moe.models import MODELS, ModelOutput, MoEModel, MoEModelConfig, RunShape
from dist_moe.parallel import experts_of_rank
from dist_moe.recipes import RECIPES
from dist_moe.recipes.stages import Stage, StagedPlan, StagedRecipe, Stages
from dist_moe.recipes.supervised.recipe import feed_of, weighted_objective
from dist_moe.tasks import TASKS, Task, TaskSettings, build_model


class CosineGate(Gate):
    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.direction = nn.Parameter(torch.randn(num_experts, dim))

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None) -> Mixture:
        score_TE = nn.functional.normalize(x_TD, dim=1) @ nn.functional.normalize(self.direction, dim=1).T
        record("waves/score", score_TE.abs().amax() if len(x_TD) else 0.0, "max")
        kept = torch.full_like(score_TE, -torch.inf).scatter(1, score_TE.topk(2, dim=1).indices, 0.0)
        return Mixture((4 * score_TE + kept).softmax(dim=1).unsqueeze(1))


@GATES.register
class CosineConfig(GateSettings):
    name: Literal["cosine"] = "cosine"

    def build(self, dim: int, num_experts: int, context: GateContext) -> Gate:
        return CosineGate(dim, num_experts)


class SineBank(ExpertBank):
    def __init__(self, dim: int, width: int, num_experts: int, expert_ids: Sequence[int]) -> None:
        super().__init__(dim, width, num_experts, expert_ids)
        self.weight = nn.Parameter(torch.stack([torch.randn(dim, width, generator=g) for g in self.generators()]))

    def forward(self, x_ND: Tensor, rows_per_expert: RowCounts) -> Tensor:
        return torch.sin(grouped_linear(x_ND, self.weight, self.weight[:, 0] * 0, rows_per_expert))


@EXPERTS.register
class SineConfig(ExpertSettings):
    name: Literal["sine"] = "sine"

    def build(self, dim: int, num_experts: int, expert_ids: Sequence[int], init_stds: Any = None) -> SineBank:
        return SineBank(dim, 8, num_experts, expert_ids)


@MODELS.register
class WaveModelConfig(MoEModelConfig):
    kind: ClassVar[str] = "waves"
    name: Literal["wave_model"] = "wave_model"
    experts: SineConfig = SineConfig()

    def build(self, run: RunShape) -> MoEModel:
        bank = self.experts.build(2, self.num_experts, experts_of_rank(self.num_experts, run.world))
        return WaveModel(self.build_layer(bank, 1, run))


class WaveModel(MoEModel):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe
        self.head = nn.Linear(moe.experts.out_dim, 1)

    def forward(self, x_BD: Tensor) -> ModelOutput:
        mixed = self.moe(x_BD)
        return ModelOutput((self.head(mixed.outputs[0])[:, 0],), (mixed,))


@dataclass(frozen=True)
class WaveBatch(ExampleBatch):
    x_BD: Tensor
    examples_in_step: int


class WaveTable:
    def __init__(self, count: int, seed: int) -> None:
        self.x_ND = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 6 - 3

    def __len__(self) -> int:
        return len(self.x_ND)

    def batch(self, index_B: Any, step_index: Any) -> WaveBatch:
        return WaveBatch(self.x_ND[index_B], len(step_index))


class WaveTask(Task):
    kind = "waves"

    train, val, test = (WaveTable(256, seed) for seed in range(3))

    def task_losses(self, output: ModelOutput, batch: WaveBatch) -> dict[str, Tensor]:
        return {"mse": self.observe(output, batch).sum().float() / batch.examples_in_step}

    def observe(self, output: ModelOutput, batch: WaveBatch) -> Tensor:
        height_B = torch.sin(batch.x_BD[:, 0]) * torch.cos(batch.x_BD[:, 1])
        return (output.predictions[0].double() - height_B).square().unsqueeze(0)

    def metrics(self, columns: Any, part: Any, weights: tuple[float, ...]) -> dict[str, float]:
        return {"loss": weights[0] * float(columns.mean())}


@TASKS.register
class WavesSettings(TaskSettings):
    kind: ClassVar[str] = "waves"
    target_names: ClassVar[tuple[str, ...]] = ("height",)
    name: Literal["waves"] = "waves"

    def open(self, *, progress: bool) -> WaveTask:
        return WaveTask()


class Gauge(Callback):
    _steps = 0  # over restarts

    def after_step(self, trainer: Trainer, step: int) -> None:
        self._steps += 1
        record("waves/steps", self._steps, "max")
        marker = Path(os.environ.get("WAVES_KILL", "."))
        if trainer.groups.environment.is_rank_zero and step == 7 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]


@CALLBACKS.register
class GaugeConfig(CallbackSettings):
    name: Literal["gauge"] = "gauge"

    def build(self) -> Callback:
        return Gauge()


@dataclass
class LossFile(Tracker):
    path: Path

    def step(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(f"{record['step']} {record['loss']} {record['waves/score']} {record.get('waves/steps')}\n")


@TRACKERS.register
class LossFileSettings(TrackerSettings):
    name: Literal["losses"] = "losses"

    def build(self, root: Path, first_step: int, say: Say) -> Tracker:
        return LossFile(root / "losses.txt")


@RECIPES.register
class HoldExpertsRecipe(StagedRecipe):
    name: Literal["hold_experts"] = "hold_experts"

    def result_of(self, root: Path) -> Path:
        return root / "stages" / "rest"

    def run(self, plan: StagedPlan, stages: Stages) -> None:
        stages.run("all", lambda stage: self._train(plan, stage, None))
        stages.run("rest", lambda stage: self._train(plan, stage, stages.directory("all").root))

    def _train(self, plan: StagedPlan, stage: Stage, first: Path | None) -> None:
        config, task = plan.start.config, plan.task
        model = build_model(config, task, stage.groups.world)
        if first is not None:
            place_weights(model, read_model(newest_checkpoint(first)))
        stage.fit(
            model,
            feed_of(config, task, stage.environment),
            weighted_objective(config, task, stage.groups),
            config.train,
            callbacks=[one.build() for one in config.callbacks] if first else [],
            trained=["moe.gates.*", "head.*"] if first else None,
        )
