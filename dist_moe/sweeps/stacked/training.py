"""Train many small trials as one: a stack of models, one stream of batches, B learning rates.

Every trial computes every expert on every example (the dense form of the layer), so that the stack is
one batched computation. Worth it where a trial alone leaves the device idle. Trials of one stack differ
in what :data:`VARYING` names and agree in everything else; each has its own patience and its own best
weights, and leaves the stack when it has finished, or when its validation loss is no longer finite.
But for dropout's random numbers, a trial comes out as it would alone.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from dist_moe.data.batches import ShuffledFeed, shard_batches
from dist_moe.engine.callbacks import EarlyStopping
from dist_moe.engine.deepspeed.config import is_adam, lookup
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.training import seed_step
from dist_moe.layer import DenseReplay
from dist_moe.models import ModelOutput
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.callbacks.swap_search import search_swaps
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.sweeps.stacked.parameters import AdamSettings, StackedParameters
from dist_moe.sweeps.stacked.permutations import LAYER, StackedPermutations
from dist_moe.tasks import build_model
from dist_moe.tasks.evaluation import expert_figures
from dist_moe.tasks.task import Task

VARYING = (
    "deepspeed.optimizer.params.lr",
    "model.gate.gamma",
    "model.gate.entropy_weight",
    "model.permutation.epochs",
    "model.permutation.entropy_weight",
)
"""What may differ between the trials of a stack."""

_GATE_NUMBERS = ("gamma", "entropy_weight")
_STACKABLE_GATES = ("comet", "dselect_k", "hash", "softmax", "top_k")
_EVAL_BATCH = 1024

Report = Callable[[int, int, float], bool]
Figures = dict[str, float]


def stack_key(config: SupervisedConfig) -> str:
    """Equal for configurations that can be trained in one stack."""
    content = config.plain()
    for dotted in VARYING:
        *sections, last = dotted.split(".")
        section: Any = content
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    return json.dumps(content, sort_keys=True)


def stack_fault(config: SupervisedConfig) -> str | None:
    """Why this configuration cannot be trained in a stack; None if it can."""
    section, gate = config.deepspeed, config.model.gate
    if not config.model.one_layer:
        return f"model.name={config.model.name} cannot be stacked"
    if gate.name not in _STACKABLE_GATES:
        return f"model.gate.name={gate.name}: only {', '.join(_STACKABLE_GATES)} can be stacked"
    if getattr(gate, "bias_update_rate", 0):
        return "model.gate.bias_update_rate: a gate with a feedback loop cannot be stacked"
    if not is_adam(str(lookup(section, "optimizer.type"))):
        return "deepspeed.optimizer.type: only Adam and AdamW can be stacked"
    unknown = set(section) - {"optimizer", "zero_optimization"}
    unknown |= set(lookup(section, "optimizer.params") or {}) - {"lr", "betas", "eps", "weight_decay", "torch_adam"}
    if unknown:
        return f"deepspeed: {', '.join(sorted(unknown))} cannot be stacked"
    if config.model.permutation is not None and config.model.permutation.forward == "hard":
        return "model.permutation.forward=hard cannot be stacked"
    return None


def train_stack(
    task: Task, configs: Sequence[SupervisedConfig], report: Report
) -> list[tuple[Figures, Figures, int] | None]:
    """(validation figures, test figures, steps) of each configuration; None where ``report`` asked to stop.

    ``report(i, step, loss)`` is called after each validation of trial i. The configurations have one
    ``stack_key``, and no ``stack_fault``.
    """
    return _StackedTraining(task, configs, LaunchEnvironment.read()).run(report)


class _StackedTraining:
    def __init__(self, task: Task, configs: Sequence[SupervisedConfig], environment: LaunchEnvironment) -> None:
        self._task = task
        self._configs = list(configs)
        self._environment = environment
        self._train = configs[0].train
        self._weights = configs[0].target_weights
        self._feed = ShuffledFeed(task.train, self._train.batch_size, configs[0].seed, device=environment.device)
        models = [build_model(config, task, SingleWorld()) for config in configs]
        self._model = models[0].to(environment.device)
        self._layer = self._model.moe_layers[LAYER]
        self._stack = StackedParameters(models, environment.device)
        self._permutations = StackedPermutations([model.tables[LAYER] for model in models], self._stack)
        self._trials = list(range(len(configs)))
        self._progress = [
            EarlyStopping(math.inf if self._train.patience is None else self._train.patience) for _ in configs
        ]
        self._kept: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._val: dict[int, Figures] = {}
        self._steps: dict[int, int] = {}

    def run(self, report: Report) -> list[tuple[Figures, Figures, int] | None]:
        total = self._train.total_steps(self._feed.steps_per_epoch)
        every = self._train.validate_every or self._feed.steps_per_epoch
        pruned: set[int] = set()
        for step in range(total):
            self._train_step(step)
            done = step + 1
            self._search_swaps(done)
            if done % every == 0 or done == total:
                pruned |= self._validate(done, done == total, report)
            if not self._trials:
                break
        tests = self._test()
        return [
            None if trial in pruned else (self._val[trial], tests[trial], self._steps[trial])
            for trial in range(len(self._configs))
        ]

    def _train_step(self, step: int) -> None:
        seed_step(self._configs[0].seed, step, self._environment.rank)
        self._model.train()
        self._permutations.begin_step(step)
        matrices, penalties = self._permutations.training(step)
        (batch,) = self._feed.micro_batches(step)

        def loss(output: ModelOutput, _: Tensor) -> Tensor:
            task = self._task.weighted(self._task.task_losses(output, batch), self._weights)
            return torch.stack([task, *output.aux.values()]).sum()

        losses = self._over_trials(loss, matrices, batch).sum()
        (losses if penalties is None else losses + penalties.sum()).backward()
        rates = [float(lookup(self._configs[i].deepspeed, "optimizer.params.lr")) for i in self._trials]
        self._stack.step(rates, _adam_settings(self._configs[0]))

    def _over_trials(self, function: Callable[[ModelOutput, Tensor], Any], matrices: list[Tensor], batch: Any) -> Any:
        """``function(output, weight_GTE)`` of every trial's model on ``batch``, vectorised over trials."""
        moe = self._layer
        numbers = {name: self._gate_numbers(name) for name in _GATE_NUMBERS if hasattr(moe.gates[0], name)}

        def one_trial(
            values: dict[str, Tensor], buffers: dict[str, Tensor], numbers: dict[str, Tensor], of_gates: list[Tensor]
        ) -> Any:
            _set_on_gates(moe.gates, numbers)
            with moe.replayed_by(replay := DenseReplay(of_gates)):
                output = functional_call(self._model, values | buffers, batch.inputs)
            assert replay.weight_GTE is not None
            return function(output, replay.weight_GTE)

        vectorised = torch.vmap(one_trial, randomness="different")
        return vectorised(self._stack.values, self._stack.buffers, numbers, matrices)

    def _gate_numbers(self, name: str) -> Tensor:
        numbers = [getattr(self._configs[i].model.gate, name) for i in self._trials]
        return torch.tensor(numbers, device=self._environment.device)

    def _validate(self, step: int, last: bool, report: Report) -> set[int]:
        """Validate all trials, and let those that have finished leave the stack; the pruned ones."""
        self._permutations.begin_evaluation(step)
        figures = self._evaluate(self._task.val)
        staying, pruned = [], set()
        for place, trial in enumerate(self._trials):
            loss, progress = figures[place]["loss"], self._progress[trial]
            if progress.is_better(loss) or self._train.patience is None or trial not in self._kept:
                self._kept[trial] = self._stack.state_of(place)
                self._val[trial] = figures[place]
            self._steps[trial] = step
            if report(trial, step, loss):
                pruned.add(trial)
            elif not (last or progress.exhausted or not math.isfinite(loss)):
                staying.append(place)
        self._say(step, [figure["loss"] for figure in figures], len(staying))
        if staying and len(staying) < len(self._trials):
            self._stack.keep(staying)
            self._permutations.keep(staying)
        self._trials = [self._trials[place] for place in staying]
        return pruned

    @torch.no_grad()
    def _evaluate(self, part: Any) -> list[Figures]:
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
            figures = self._task.figures(trial_columns, part, self._weights)
            experts = expert_figures(load_GE.unsqueeze(0), len(part))
            found.append(figures | {name: float(x) for name, x in experts.items() if not isinstance(x, list)})
        return found

    def _test(self) -> list[Figures]:
        """Test figures of the weights that were kept of every trial."""
        self._trials = list(range(len(self._configs)))
        for kind, tensors in enumerate((self._stack.values, self._stack.buffers)):
            for name in tensors:
                tensors[name] = torch.stack([self._kept[trial][kind][name] for trial in self._trials])
        return self._evaluate(self._task.test)

    def _search_swaps(self, step: int) -> None:
        for place, trial in enumerate(self._trials):
            search = self._configs[trial].swap_search
            if search is None or not search.due(step, self._feed.steps_per_epoch):
                continue
            if self._permutations.learning(place, step):
                continue
            self._stack.write(self._model, place)
            gate = self._configs[trial].model.gate
            _set_on_gates(self._layer.gates, {n: getattr(gate, n) for n in _GATE_NUMBERS if hasattr(gate, n)})
            search_swaps(self._task, self._model, search, self._weights, self._environment)
            self._stack.buffers[f"{LAYER}.slot_map.table"][place] = self._model.tables[LAYER].table

    def _say(self, step: int, losses: list[float], staying: int) -> None:
        epoch = step / self._feed.steps_per_epoch
        label, ending = self._configs[0].gate_label, f"{staying} go on" if staying else "the last of these"
        print(
            f"{label}, epoch {epoch:.4g} of {self._train.epochs:g}: {len(losses)} trials together, "
            f"best validation loss {min(losses):.4f}, {ending}",
            file=sys.stderr,
        )


def _set_on_gates(gates: torch.nn.Module, numbers: dict[str, Any]) -> None:
    for gate in gates.children():
        for name, value in numbers.items():
            setattr(gate, name, value)


def _adam_settings(config: SupervisedConfig) -> AdamSettings:
    optimizer = config.deepspeed["optimizer"]
    params = optimizer.get("params") or {}
    first, second = params.get("betas", (0.9, 0.999))
    # DeepSpeed's "Adam" decays weights as AdamW does, unless told otherwise.
    decoupled = optimizer["type"].lower() == "adamw" or params.get("adam_w_mode", True)
    return AdamSettings((first, second), params.get("eps", 1e-8), params.get("weight_decay", 0.0), decoupled)
