"""Recovery: a model with fewer or smaller experts is trained on its task and to follow the uncompressed one.

M-SMoE (Li et al.: Merge, Then Compress, ICLR 2024) trains all but the gates by the labels, with weight 1, and by the
teacher's predictions, with weight 0.2 and T = 2; its release neither multiplies by T^2 nor takes means over positions:
the losses here are those of :mod:`dist_moe.recipes.distillation.predictions`. Router KD (arXiv 2603.02217) trains the
gates alone, by the teacher alone. Gates that are not trained are held still: they route as in an evaluation, and have
no auxiliary losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_moe.engine.callbacks import Callback
from dist_moe.engine.checkpoint import ModelWeights, place_weights
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.engine.trainable import Trained as TrainedParts
from dist_moe.engine.training import Objective, Trainer
from dist_moe.errors import UserError
from dist_moe.models import MoEModel
from dist_moe.recipes.distillation import DistillationObjective, Teacher
from dist_moe.recipes.merge_compress.settings import RecoverConfig, Trained
from dist_moe.recipes.stages import Stage
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.recipe import (
    FinalEvaluation,
    Opening,
    SupervisedPlan,
    SupervisedResult,
    callbacks_of,
    feed_of,
    summarise,
    weighted_objective,
)
from dist_moe.recipes.supervised.runs import trained_model
from dist_moe.tasks import Task, build_model, evaluate


def check_recovery(recover: RecoverConfig, config: SupervisedConfig, task: Task, model: MoEModel) -> None:
    """Raise UserError for what ``model``, of ``config`` and with or without storage, cannot be recovered by."""
    targets = config.data.target_names
    if not task.prediction_kinds or len(task.prediction_kinds) % len(targets):
        raise UserError(
            f"data.name={config.data.name}: its task does not say what its predictions mean, by which a teacher is "
            "followed; give it prediction_kinds, equally many for each target"
        )
    if recover.hidden_weight and not config.model.gives_hidden_states:
        raise UserError(
            f"recipe.recover.hidden_weight={recover.hidden_weight:g}: model.name={config.model.name} gives no hidden "
            "states; set it to 0"
        )
    window = None if config.assignment_search is None else config.assignment_search.while_entropy
    if window is not None and not recover.trains_router:
        raise UserError(
            f"assignment_search.while_entropy={list(window)}: recipe.recover.trained={recover.trained} leaves the "
            "gates as they are; use at_steps or until_step, or train all"
        )
    trained = trained_parts(recover.trained, model)
    if trained is not None and not any(trained(name) and p.requires_grad for name, p in model.named_parameters()):
        raise UserError(
            f"recipe.recover.trained={recover.trained}: gate.name={config.model.gate.name} has no parameters to train; "
            "use all_but_router"
        )


def trained_parts(trained: Trained, model: MoEModel) -> Any:
    """Return which parameters are trained: a predicate on their names in ``model``, None for all."""
    gates = tuple(f"{layer}.gates." for layer in model.moe_layers)
    experts = tuple(f"{layer}.experts." for layer in model.moe_layers)
    predicates: dict[Trained, Any] = {
        "all": None,
        "all_but_router": lambda name: not name.startswith(gates),
        "experts": lambda name: name.startswith(experts),
        "router": lambda name: name.startswith(gates),
    }
    return predicates[trained]


def recovery_objective(
    recover: RecoverConfig, source: Path, config: SupervisedConfig, task: Task, groups: ProcessGroups
) -> DistillationObjective:
    """Return the task's loss and that of following the run ``source``, of which this rank holds its experts.

    Raises UserError if that run is not intact.
    """
    plain = weighted_objective(config, task, groups, auxiliary=recover.trains_router)
    teacher = Teacher(trained_model(source, task, groups.world).to(groups.device))
    weights = dict(zip(config.data.target_names, config.target_weights, strict=True))
    terms = recover.terms(task.prediction_kinds, weights)
    return DistillationObjective(plain, teacher, terms, recover.ask, weight=recover.loss_weight)


class FirstEvaluation(Callback):
    """Evaluates a student on the validation examples before it is trained.

    ``metrics``: those that are numbers, or have no value; also after a resumption.
    """

    def __init__(self, task: Task, weights: tuple[float, ...]) -> None:
        self._task, self._weights = task, weights
        self.metrics = dict[str, Any]()

    def on_start(self, trainer: Trainer) -> None:
        """Evaluate, and show the metrics, unless the fit goes on."""
        if trainer.step == 0:
            metrics = evaluate(self._task, trainer.model, self._task.val, self._weights, trainer.groups)
            trainer.monitor.evaluation("validation", metrics, 0, self._task.headlines)
            self.metrics = {name: x for name, x in metrics.items() if x is None or isinstance(x, int | float)}

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics."""
        return self.metrics

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the metrics of the fit that goes on."""
        self.metrics = state


def fit_student(
    stage: Stage,
    config: SupervisedConfig,
    task: Task,
    model: MoEModel,
    objective: Objective,
    *,
    trained: TrainedParts | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train ``model`` as a stage, as supervised training would, but by ``objective``; return metrics before and after.

    ``config``: of the model that the stage leaves, and of its training. ``trained``, ``callbacks``: see ``fit``.
    Collective over all ranks.
    """
    environment = stage.environment
    start = replace(stage.start, config=config, run=stage.run, environment=environment, warnings=[])
    plan = SupervisedPlan(start, task, feed_of(config, task, environment), stage.checkpoint, stage.identity)
    first, ending = FirstEvaluation(task, config.target_weights), FinalEvaluation(task, config.target_weights)
    fitted = stage.fit(
        model,
        plan.feed,
        objective,
        config.train,
        trained=trained,
        callbacks=[Opening(plan), first, *callbacks, *callbacks_of(config, task, None), ending],
        keep_model=False,
    )
    if environment.is_rank_zero:
        summarise(plan, SupervisedResult(fitted, ending.val, ending.test, ending.tested_step), ending)
    metrics = {"val_before": first.metrics, "val": ending.val, "test": ending.test}
    return {"steps": fitted.steps, "tested_step": ending.tested_step} | metrics


def student_of(stage: Stage, config: SupervisedConfig, task: Task, weights: ModelWeights) -> MoEModel:
    """Return the model of ``config``, with this rank's experts; it begins with ``weights`` unless it goes on."""
    model: MoEModel = build_model(config, task, stage.groups.world)
    if stage.checkpoint is None:
        place_weights(model, weights)
    return model
