"""Mowst as a recipe: a weak and a strong network trained in turns, each while the other is held still.

Zeng et al.: Mixture of Weak & Strong Experts on Graphs (ICLR 2024). The stages, each one fit with early stopping by the
loss of the validation nodes, of which the best weights are kept:

    alone-weak, alone-strong           each network as ``node_classifier`` would train it: to begin with, or to compare
    session-NN-weak                    weak network and confidence; the strong one is held still, buffers included
    session-NN-strong                  strong network; weak one and confidence are held still
    inference                          no training: what answers, and at which cost, see :mod:`.inference`

A turn begins with the best weights so far, of both networks and the confidence; what it leaves is kept if its loss is
less than any before. Sessions end when some in a row brought nothing. Mowst* trains all parts together on mixed
predictions: ``alone-*``, ``together``, ``inference``.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from dist_moe.config.files import read_json
from dist_moe.config.settings import LARGEST_COUNT
from dist_moe.engine.checkpoint import place_weights, read_model
from dist_moe.engine.checkpoint.files import tested_checkpoint
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.errors import UserError
from dist_moe.models import NodeClassifierConfig, WeakStrongConfig
from dist_moe.recipes.mowst.inference import report
from dist_moe.recipes.recipe import RunStart, validate_recipe
from dist_moe.recipes.stages import RunOfStage, Stage, StagedPlan, StagedRecipe, Stages
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.recipe import callbacks_of, feed_of, weighted_objective
from dist_moe.tasks import build_model, evaluate
from dist_moe.tasks.evaluation import check_parts, check_selection, label_warnings

PARTS = ("weak", "strong")
TRAINED = {"weak": ("layer.weak.", "layer.confidence."), "strong": ("layer.strong.",), "together": ("layer.",)}
"""Beginnings of the names of the parameters that train, by turn."""


class MowstRecipe(StagedRecipe):
    """Train a ``weak_strong`` model in turns (Mowst), or together on mixed predictions (Mowst*)."""

    name: Literal["mowst", "mowst_star"] = Field(
        "mowst", description="a weak and a strong network in turns, or together (mowst_star)"
    )
    pretrain: Literal["none", "weak", "strong", "both"] = Field(
        "weak", description="which networks begin as trained alone; the other ones begin at random"
    )
    compare: bool = Field(True, description="train each network alone in any case, to be compared with")
    max_sessions: int = Field(10, ge=1, le=999, description="sessions at most: a turn of the weak, one of the strong")
    session_patience: int = Field(2, ge=1, description="end after this many sessions in a row without a better loss")
    tolerance: float = Field(
        0.0, ge=0, le=1, description="validation accuracy that the threshold may give up for fewer nodes that ask"
    )
    draws: int = Field(50, ge=1, le=LARGEST_COUNT, description="draws of who answers, for the sampled accuracy")

    def check_config(self, config: SupervisedConfig) -> None:
        """Raise UserError for another model, a mixture that is not the method's, and turns without an end."""
        if not isinstance(config.model, WeakStrongConfig):
            raise UserError(f"recipe.name={self.name}: for model.name=weak_strong, not {config.model.name}")
        fitting = ("losses",) if self.name == "mowst" else ("predictions", "logits")
        if config.model.mixture not in fitting:
            raise UserError(
                f"model.mixture={config.model.mixture}: recipe.name={self.name} trains on {' or '.join(fitting)}"
            )
        if config.train.patience is None:
            raise UserError(f"train.patience=null: recipe.name={self.name} ends a turn by it; give a number")

    def plan(self, start: RunStart) -> StagedPlan:
        """Open the task and check that it can be trained on. Raises UserError."""
        plan, config = super().plan(start), start.config
        check_parts(plan.task)
        check_selection(plan.task, config.target_weights, f"recipe.name={self.name}")
        start.warnings.extend(label_warnings(plan.task, config.target_weights))
        feed_of(config, plan.task, start.environment)
        return plan

    def result_of(self, root: Path) -> Path:
        """Return the directory of the turn with the least loss; where none has finished, that of the first one."""
        stages = (path for path in sorted(root.glob("stages/*")) if path.name.startswith(("session-", "together")))
        turns = [path for path in stages if RunDirectory(path).result.is_file()]
        if not turns:
            return root / "stages" / ("session-01-weak" if self.name == "mowst" else "together")
        return min(turns, key=lambda turn: float(read_json(RunDirectory(turn).result)["loss"]))

    def run(self, plan: StagedPlan, stages: Stages) -> None:
        """Run the stages in order."""
        pretrained = PARTS if self.pretrain == "both" else (self.pretrain,)
        wanted = [part for part in PARTS if self.compare or part in pretrained]
        alone = {part: stages.run(f"alone-{part}", partial(train_alone, plan, part)) for part in wanted}
        begin = {part: stages.directory(f"alone-{part}").root for part in wanted if part in pretrained}
        turns = self._turns(plan, stages, begin)
        best = stages.directory(min(turns, key=lambda turn: turns[turn])).root
        stages.run("inference", lambda stage: report(plan, stage, best, turns, alone))

    def _turns(self, plan: StagedPlan, stages: Stages, begin: dict[str, Path]) -> dict[str, float]:
        """Run the turns; return the best validation loss of each."""
        losses: dict[str, float] = {}
        stale = 0
        sessions, parts = (1, ("together",)) if self.name == "mowst_star" else (self.max_sessions, PARTS)
        while len(losses) < len(parts) * sessions and stale < self.session_patience:
            before = min(losses.values(), default=math.inf)
            for part in parts:
                name = part if part == "together" else f"session-{1 + len(losses) // 2:02}-{part}"
                best = stages.directory(min(losses, key=lambda turn: losses[turn])).root if losses else None
                turn = partial(take_turn, plan, part, len(losses), best, begin)
                losses[name] = float(stages.run(name, turn)["loss"])
            stale = 0 if min(losses.values()) < before else stale + 1
        return losses


def train_alone(plan: StagedPlan, part: str, stage: Stage) -> RunOfStage:
    """Train the weak or the strong network as a model of its own, whose run the stage's directory holds then.

    The result has the network's name, its loss and its metrics.
    """
    config, task = plan.start.config, plan.task
    network, supervised = getattr(config.model, part), validate_recipe("supervised")
    alone = config.model_copy(update={"model": NodeClassifierConfig(network=network), "recipe": supervised})
    model = build_model(alone, task, stage.groups.world)
    loss = _fitted(plan, stage, model, config.seed, None)
    val, test = (evaluate(task, model, of, config.target_weights, stage.groups) for of in (task.val, task.test))
    return RunOfStage({"network": network.name, "loss": loss, "val": val, "test": test}, alone)


def take_turn(
    plan: StagedPlan, part: str, number: int, best: Path | None, begin: dict[str, Path], stage: Stage
) -> dict[str, Any]:
    """Train a part of the model from the weights of the stage ``best``, or where networks ``begin`` as trained alone.

    ``number``: of the turn, from 0, for its random numbers. Returns the least validation loss.
    """
    config = plan.start.config
    model = build_model(config, plan.task, stage.groups.world)
    if best is not None:
        place_weights(model, read_model(tested_checkpoint(best)))
    for name, directory in begin.items() if best is None else ():
        weights = read_model(tested_checkpoint(directory))
        place_weights(getattr(model.layer, name), {key.removeprefix("network."): weights[key] for key in weights})
    return {"loss": _fitted(plan, stage, model, config.seed + 1000 * (number + 1), TRAINED[part]), "part": part}


def _fitted(plan: StagedPlan, stage: Stage, model: nn.Module, seed: int, trained: tuple[str, ...] | None) -> float:
    """Fit until patience ends; return the least validation loss, whose weights the model has then."""
    config, task = plan.start.config, plan.task
    result = stage.fit(
        model,
        feed_of(config.model_copy(update={"seed": seed}), task, stage.environment),
        weighted_objective(config, task, stage.groups),
        config.train,
        seed=seed,
        callbacks=callbacks_of(config, task, None),
        trained=None if trained is None else lambda name: name.startswith(trained),
    )
    return min(result.history.validation_losses.values())
