"""Labelled texts as a problem: the class of a text or of a pair of texts, or a number about it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.data.labelled_text import LabelledBatch, LabelledTable, LabelledText
from dist_moe.engine.launch_environment import LaunchEnvironment
from dist_moe.errors import UserError
from dist_moe.gates import GateContext
from dist_moe.models import BertClassifier, BertClassifierConfig, ModelOutput, RunShape
from dist_moe.models.conversion import neuron_importance
from dist_moe.parallel import SingleWorld, World, sum_over_ranks
from dist_moe.recipes.classification_metrics import METRICS
from dist_moe.recipes.problem import Columns, Figures, Problem, at_least_fp32
from dist_moe.recipes.text_start import Encoder, check_start, check_teacher, fill_from_start, rehearse_start
from dist_moe.recipes.text_start_config import TextStartConfig
from dist_moe.recipes.weights import find_weights

CROSS_ENTROPY, SQUARED_ERROR = "ce", "mse"


class TextClassificationProblem(Problem):
    """Cross-entropy of classes, or squared error of numbers; gates that route by identity see the token.

    Raises UserError if texts or tokens do not fit the encoder.
    """

    eval_batch = 64

    train: LabelledTable

    def __init__(self, data: LabelledText, encoder: Encoder, start: TextStartConfig) -> None:
        _check_fit(data, encoder)
        self.train, self.val, self.test = data.train, data.val, data.test
        self.manifest: dict[str, Any] = data.manifest | {"encoder": encoder.provenance}
        self._task = data.task
        self._encoder = encoder
        self._start = start

    @property
    def is_regression(self) -> bool:
        """Whether a number is predicted, not a class."""
        return not self._task.classes

    @property
    def num_outputs(self) -> int:
        """Width of the model's prediction: the number of classes, or 1 where a number is predicted."""
        return len(self._task.classes) or 1

    def build_model(self, model: BertClassifierConfig, run: RunShape) -> BertClassifier:
        return model.build(self._encoder.shape, self.num_outputs, run)

    def check_new_run(self, config: Any) -> None:
        """What it starts from and whom it follows are there, and fit. Raises `UserError`."""
        check_start(self._start, config.model, config.data)
        with torch.device("meta"):
            model = self.build_model(config.model, self._shape_of_run(config, SingleWorld()))
        rehearse_start(model, config.model, self._start, self._encoder, self._rehearsed)
        if config.distillation is not None:
            check_teacher(config.distillation.teacher, config)
            self._rehearsed(config.distillation.teacher)

    def first_weights(self, model: BertClassifier, settings: BertClassifierConfig) -> None:
        """Those of the encoder or of the run that the configuration names, converted where there are experts."""
        fill_from_start(
            model,
            settings,
            self._start,
            self._encoder,
            open_run=lambda path: self.trained(path, SingleWorld()),
            importance=self._importance,
        )

    def trained(self, run: Path, world: World) -> BertClassifier:
        """The classifier of a finished run, fp32, with this rank's experts. Raises UserError if it is not intact."""
        return self._of_run(run, world, torch.device("cpu"))

    def _rehearsed(self, run: Path) -> BertClassifier:
        """The whole of it without storage: its weights are there and fit."""
        return self._of_run(run, SingleWorld(), torch.device("meta"))

    def _of_run(self, run: Path, world: World, device: torch.device) -> BertClassifier:
        weights = find_weights(run)
        if not isinstance(weights.config.model, BertClassifierConfig):
            raise UserError(f"{run} is a run of model.name={weights.config.model.name}, not of a text classifier")
        with device:
            model = self.build_model(weights.config.model, self._shape_of_run(weights.config, world))
        weights.load(model)
        return model

    def _shape_of_run(self, config: Any, world: World) -> RunShape:
        steps_per_epoch = max(len(self.train) // config.train.batch_size, 1)
        context = GateContext(self.id_counts(), config.train.total_steps(steps_per_epoch))
        return RunShape(world, steps_per_epoch, context)

    def _importance(self, model: BertClassifier) -> Tensor:
        """In fp64, so that the order of neurons does not depend on how ranks share out the examples."""
        environment = LaunchEnvironment.read()
        examples = np.arange(min(self._start.importance_examples, len(self.train)))
        shares = shard_batches(examples, self.eval_batch, rank=environment.rank, world_size=environment.world_size)
        batches = (self.train.batch(index_B, examples).to(environment.device) for index_B in shares)
        importance_LH = neuron_importance(
            model.double().to(environment.device),
            batches,
            inputs=lambda batch: batch.inputs,
            losses=lambda output, batch: _losses(output.predictions[0], batch.label_B),
        )
        return sum_over_ranks(importance_LH).cpu()

    def id_counts(self) -> Tensor:
        return self._token_counts

    @cached_property
    def _token_counts(self) -> Tensor:
        return torch.from_numpy(np.bincount(self.train.token_M, minlength=self._encoder.shape.vocab))

    def task_losses(self, output: ModelOutput, batch: LabelledBatch) -> dict[str, Tensor]:
        """``ce`` or ``mse``: a sum over the step's number of examples."""
        loss_B = _losses(at_least_fp32(output.predictions[0]), batch.label_B)
        return {self._loss_name: loss_B.sum() / batch.examples_in_step}

    def observe(self, output: ModelOutput, batch: LabelledBatch) -> Tensor:
        """Rows: the loss of each example, and the class or the number that is predicted."""
        predicted_BC = output.predictions[0].double()
        answer_B = predicted_BC[:, 0] if self.is_regression else predicted_BC.argmax(1).double()
        return torch.stack([_losses(predicted_BC, batch.label_B), answer_B])

    def figures(self, columns: Columns, part: LabelledTable, weights: tuple[float, ...]) -> Figures:
        loss_N, answer_N = columns
        mean = float(loss_N.mean())
        metrics = {name: METRICS[name](answer_N, np.asarray(part.target_N)) for name in self._task.metrics}
        return metrics | {self._loss_name: mean, "loss": weights[0] * mean}

    def baselines(self, part: LabelledTable, weights: tuple[float, ...]) -> dict[str, Figures]:
        """``constant``: the share of each class among the training examples, or the mean of their numbers."""
        train_N, target_N = np.asarray(self.train.target_N), np.asarray(part.target_N)
        columns = _mean(train_N, target_N) if self.is_regression else _shares(train_N, target_N, self.num_outputs)
        return {"constant": self.figures(columns, part, weights)}

    @property
    def _loss_name(self) -> str:
        return SQUARED_ERROR if self.is_regression else CROSS_ENTROPY


def _check_fit(data: LabelledText, encoder: Encoder) -> None:
    shape, longest = encoder.shape, data.manifest["max_length"]
    if longest > shape.positions:
        raise UserError(f"data.max_length={longest}: the encoder has {shape.positions} positions; give at most so many")
    if data.vocabulary > shape.vocab:
        raise UserError(
            f"data.tokenizer knows {data.vocabulary} tokens, the encoder {shape.vocab}; leave it out to have the "
            f"encoder's own"
        )
    if data.task.pairs and shape.segments < 2:
        raise UserError(f"start.encoder knows {shape.segments} segment(s); the pairs of {data.task.title} need 2")


def _losses(predicted_BC: Tensor, label_B: Tensor) -> Tensor:
    """(B,): cross-entropy of class numbers, squared error of floating-point labels."""
    if label_B.is_floating_point():
        return (predicted_BC[:, 0] - label_B).square()
    return F.cross_entropy(predicted_BC, label_B, reduction="none")


def _mean(train_N: NDArray[Any], target_N: NDArray[Any]) -> Columns:
    """Columns as `TextClassificationProblem.observe` gives them, of who always says the training mean."""
    mean = train_N.astype(np.float64).mean()
    return np.stack([(target_N - mean) ** 2, np.full(len(target_N), mean)])


def _shares(train_N: NDArray[Any], target_N: NDArray[Any], classes: int) -> Columns:
    """The same of the training shares; one count is added to each class, so that one without training examples
    costs much but not everything."""
    share_C = (np.bincount(train_N, minlength=classes) + 1) / (len(train_N) + classes)
    return np.stack([-np.log(share_C[target_N]), np.full(len(target_N), float(share_C.argmax()))])
