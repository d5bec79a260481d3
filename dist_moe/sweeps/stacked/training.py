"""Train many small trials as one: a stack of models, one stream of batches, B learning rates.

Every trial computes every expert on every example (the dense form of the layer), so that the stack is
one batched computation. Worth it where a trial alone leaves the device idle. Trials of one stack differ
in what :data:`VARYING` and their gate's ``varying`` name and agree in everything else; each has its own patience and
its own best weights, and leaves the stack when it has finished, or when its validation loss is no longer finite.
But for dropout's random numbers, a trial comes out as it would alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from dist_moe.config.files import json_line
from dist_moe.data.batches import ShuffledFeed, shard_batches
from dist_moe.engine.callbacks import EarlyStopping
from dist_moe.engine.deepspeed.config import is_adam, lookup
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.training import seed_step
from dist_moe.gates import GATES
from dist_moe.layer import DenseReplay
from dist_moe.models import ModelOutput
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.screen import say
from dist_moe.sweeps.runner import Report, TrialResult
from dist_moe.sweeps.stacked.parameters import AdamSettings, StackedParameters, Tensors
from dist_moe.sweeps.stacked.permutations import LAYER, StackedPermutations
from dist_moe.tasks import Task, WeightedObjective, build_model
from dist_moe.tasks.evaluation import expert_metrics
from dist_moe.tasks.task import Metrics

VARYING = ("deepspeed.optimizer.params.lr", "model.permutation.epochs", "model.permutation.entropy_weight")
"""Fields that may differ between trials of a stack, whatever the gate; see :class:`~dist_moe.gates.GateSettings`."""

_EVAL_BATCH = 1024


def stack_key(config: SupervisedConfig) -> str:
    """Return a text that is equal for configurations which can be trained in one stack."""
    content = config.plain()
    for dotted in (*VARYING, *(f"model.gate.{name}" for name in config.model.gate.varying)):
        *sections, last = dotted.split(".")
        section: Any = content
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    return json_line(content, sort_keys=True)


def stack_error(config: SupervisedConfig) -> str | None:
    """Return why this configuration cannot be trained in a stack, None if it can."""
    section, gate = config.deepspeed, config.model.gate
    if not config.model.one_layer:
        return f"model.name={config.model.name} cannot be stacked"
    if getattr(getattr(config.model, "experts", None), "batch_dependent", False):
        return "model.experts.batch_norm=true cannot be stacked"
    if not gate.stackable:
        stackable = ", ".join(name for name in GATES.names if GATES.by_name[name].stackable)
        return f"model.gate.name={gate.name}: only {stackable} can be stacked"
    for error in gate.stacking_errors():
        return f"model.gate.{error}"
    if not is_adam(str(lookup(section, "optimizer.type"))):
        return "deepspeed.optimizer.type: only Adam and AdamW can be stacked"
    unknown = set(section) - {"optimizer", "zero_optimization"}
    unknown |= set(lookup(section, "optimizer.params") or {}) - {"lr", "betas", "eps", "weight_decay", "torch_adam"}
    if unknown:
        return f"deepspeed: {', '.join(sorted(unknown))} cannot be stacked"
    if config.model.permutation is not None and config.model.permutation.forward == "hard":
        return "model.permutation.forward=hard cannot be stacked"
    if config.model.permutation is not None and config.model.permutation.control is not None:
        return f"model.permutation.control={config.model.permutation.control} cannot be stacked"
    if config.assignment_search is not None and config.assignment_search.while_entropy is not None:
        return f"assignment_search.while_entropy={list(config.assignment_search.while_entropy)} cannot be stacked"
    return None


def train_stack(task: Task, configs: Sequence[SupervisedConfig], report: Report) -> list[TrialResult | None]:
    """Return the result of each configuration, None where ``report`` asked to stop.

    ``report(i, step, loss)`` is called after each validation of trial i. The configurations have one
    ``stack_key``, and no ``stack_error``.
    """
    return _StackedTraining(task, configs).run(report)


@dataclass
class _Trial:
    """``kept``: the parameters and buffers to test, the best or the last; ``val``: their validation metrics."""

    number: int
    config: SupervisedConfig
    stopping: EarlyStopping
    kept: tuple[Tensors, Tensors] | None = None
    val: Metrics = field(default_factory=dict)
    steps: int = 0
    pruned: bool = False


class _StackedTraining:
    """``_trials``: all of them; ``_present``: those that are still trained, in the order of the stack's axis 0."""

    def __init__(self, task: Task, configs: Sequence[SupervisedConfig]) -> None:
        self._environment = LaunchEnvironment.read()
        device = self._environment.device
        self._task, self._first = task, configs[0]
        self._train, self._weights = self._first.train, self._first.target_weights
        self._feed = ShuffledFeed(task.train, self._train.batch_size, self._first.seed, device=device)
        self._objective = WeightedObjective(task, self._weights, shares=1)
        models = [build_model(config, task, SingleWorld()) for config in configs]
        self._model = models[0].to(device)
        self._layer = self._model.moe_layers[LAYER]
        self._stack = StackedParameters(models, device)
        self._permutations = StackedPermutations([model.tables[LAYER] for model in models], self._stack)
        patience = math.inf if self._train.patience is None else self._train.patience
        self._trials = [_Trial(i, config, EarlyStopping(patience)) for i, config in enumerate(configs)]
        self._present = list(self._trials)

    def run(self, report: Report) -> list[TrialResult | None]:
        total = self._train.total_steps(self._feed.steps_per_epoch)
        every = self._train.validate_every or self._feed.steps_per_epoch
        for step in range(1, total + 1):
            self._train_step(step - 1)
            self._search_tables(step)
            if step % every == 0 or step == total:
                self._validate(step, step == total, report)
            if not self._present:
                break
        self._present = self._trials
        self._stack.restore([trial.kept for trial in self._trials if trial.kept is not None])
        tests = self._evaluate(self._task.test)
        return [
            None if trial.pruned else TrialResult(trial.val, test, trial.steps)
            for trial, test in zip(self._trials, tests, strict=True)
        ]

    def _train_step(self, step: int) -> None:
        seed_step(self._first.seed, step, self._environment.rank)
        self._model.train()
        self._permutations.begin_step(step)
        matrices, penalties = self._permutations.training(step)
        (batch,) = self._feed.micro_batches(step)

        def loss(output: ModelOutput, _: Tensor) -> Tensor:
            return self._objective.losses(output, batch)["total_loss"]

        # A trial's parameters have gradients from its own loss alone, so that one sum serves all of them.
        losses = self._over_trials(loss, matrices, batch).sum()
        (losses if penalties is None else losses + penalties.sum()).backward()
        rates = [float(lookup(trial.config.deepspeed, "optimizer.params.lr")) for trial in self._present]
        self._stack.step(rates, _adam_settings(self._first))

    def _over_trials(self, function: Callable[[ModelOutput, Tensor], Any], matrices: list[Tensor], batch: Any) -> Any:
        """``function(output, weight_GTE)`` of every trial's model on ``batch``, vectorised over trials."""
        moe = self._layer
        gates = [trial.config.model.gate for trial in self._present]
        varying = {name: [getattr(gate, name) for gate in gates] for name in gates[0].varying}
        numbers = {name: torch.tensor(values, device=self._environment.device) for name, values in varying.items()}

        def one_trial(values: Tensors, buffers: Tensors, numbers: Tensors, of_gates: list[Tensor]) -> Any:
            self._set_on_gates(numbers)
            with moe.replayed_by(replay := DenseReplay(of_gates)):
                output = functional_call(self._model, values | buffers, batch.inputs)
            assert replay.weight_GTE is not None
            return function(output, replay.weight_GTE)

        vectorised = torch.vmap(one_trial, randomness="different")
        return vectorised(self._stack.values, self._stack.buffers, numbers, matrices)

    def _set_on_gates(self, numbers: dict[str, Any]) -> None:
        for gate in self._layer.gates:
            for name, value in numbers.items():
                setattr(gate, name, value)

    def _validate(self, step: int, last: bool, report: Report) -> None:
        """Validate all trials, and let those that have finished or are pruned leave the stack."""
        self._permutations.begin_evaluation(step)
        metrics = self._evaluate(self._task.val)
        losses = [one["loss"] for one in metrics]
        staying = []
        for place, (trial, loss) in enumerate(zip(self._present, losses, strict=True)):
            if trial.stopping.is_better(loss) or self._train.patience is None or trial.kept is None:
                trial.kept, trial.val = self._stack.state_of(place), metrics[place]
            trial.steps, trial.pruned = step, report(trial.number, step, loss)
            if not (trial.pruned or last or trial.stopping.exhausted or not math.isfinite(loss)):
                staying.append(place)
        epoch, ending = step / self._feed.steps_per_epoch, f"{len(staying)} go on" if staying else "the last of these"
        say(
            f"{self._first.gate_label}, epoch {epoch:.4g} of {self._train.epochs:g}: {len(losses)} trials together, "
            f"best validation loss {min(losses):.4f}, {ending}"
        )
        if staying and len(staying) < len(self._present):
            self._stack.keep(staying)
            self._permutations.keep(staying)
        self._present = [self._present[place] for place in staying]

    @torch.no_grad()
    def _evaluate(self, part: Any) -> list[Metrics]:
        self._model.eval()
        columns, loads = [], []

        def observe(output: ModelOutput, weight_GTE: Tensor) -> tuple[Tensor, Tensor]:
            return self._task.observe(output, batch), (weight_GTE > 0).sum(1)

        for index_B in shard_batches(part, _EVAL_BATCH, rank=0, world_size=1):
            batch = part.batch(index_B, index_B).to(self._environment.device)
            observed, load = self._over_trials(observe, self._permutations.hard(), batch)
            columns.append(observed)
            loads.append(load)
        of_trials, load = torch.cat(columns, dim=-1).cpu().numpy(), torch.stack(loads).sum(0)
        found = []
        for trial_columns, load_GE in zip(of_trials, load, strict=True):
            experts = expert_metrics({LAYER: load_GE}, len(part))
            numbers = {name: float(x) for name, x in experts.items() if isinstance(x, (int, float))}
            found.append(self._task.metrics(trial_columns, part, self._weights) | numbers)
        return found

    def _search_tables(self, step: int) -> None:
        for place, trial in enumerate(self._present):
            gate, seed = trial.config.model.gate, self._first.seed
            due = [one for one in trial.config.table_searches if one.due(step, self._feed.steps_per_epoch)]
            if not due or self._permutations.learning(place, step):
                continue
            self._stack.write(self._model, place)
            self._set_on_gates({name: getattr(gate, name) for name in gate.varying})
            for search in due:
                search.search(self._task, self._model, self._weights, self._environment, seed, step)
            self._stack.buffers[f"{LAYER}.slot_map.table"][place] = self._model.tables[LAYER].table


def _adam_settings(config: SupervisedConfig) -> AdamSettings:
    optimizer = config.deepspeed["optimizer"]
    params = optimizer.get("params") or {}
    first, second = params.get("betas", (0.9, 0.999))
    # DeepSpeed's "Adam" decays weights as AdamW does, unless told otherwise.
    decoupled = optimizer["type"].lower() == "adamw" or params.get("adam_w_mode", True)
    return AdamSettings((first, second), params.get("eps", 1e-8), params.get("weight_decay", 0.0), decoupled)
