"""Problems of text on a BERT encoder: what their models begin with, and what matters in them."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.data.labelled_text import LabelledBatch, LabelledTable
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError
from dist_moe.gates import GateContext
from dist_moe.models import BertConfig, BertModel, ModelOutput, RunShape
from dist_moe.models.conversion import neuron_importance
from dist_moe.parallel import SingleWorld, World, sum_over_ranks
from dist_moe.recipes.supervised.runs import find_weights
from dist_moe.recipes.supervised.start.bert import Encoder, check_start, check_teacher, fill_from_start, rehearse_start
from dist_moe.recipes.supervised.start.bert_config import TextStartConfig
from dist_moe.tasks.task import ExampleShape, Problem, at_least_fp32


class TextData(Protocol):
    """A prepared data set. ``vocabulary``: how many ids the tokenizer has."""

    @property
    def train(self) -> LabelledTable: ...
    @property
    def val(self) -> LabelledTable: ...
    @property
    def test(self) -> LabelledTable: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def manifest(self) -> dict[str, Any]: ...


class TextProblem(Problem):
    """One task of texts; gates that route by identity see the token.

    ``settings``: the section of the models that fit. ``classes``: names, where classes are predicted. ``loss_name``:
    under which the task's loss is recorded.
    Raises UserError if texts or tokens do not fit the encoder.
    """

    eval_batch = 64

    settings: ClassVar[type[BertConfig]]
    classes: tuple[str, ...] = ()
    train: LabelledTable

    def __init__(self, data: TextData, encoder: Encoder, start: TextStartConfig) -> None:
        _check_fit(data, encoder)
        self.train, self.val, self.test = data.train, data.val, data.test
        self.manifest: dict[str, Any] = data.manifest | {"encoder": encoder.provenance}
        self.encoder = encoder
        self._start = start

    def example_shape(self) -> ExampleShape:
        """Tokens of the mean training text, places of the longest: a batch is as wide as its longest text."""
        length_N = self.train.length_N
        return ExampleShape(float(length_N.mean()), int(length_N.max()))

    @property
    @abstractmethod
    def loss_name(self) -> str: ...

    @abstractmethod
    def losses(self, predictions: tuple[Tensor, ...], label_B: Tensor) -> Tensor:
        """(B,): the loss of each example, in the precision of ``predictions``."""

    def task_losses(self, output: ModelOutput, batch: LabelledBatch) -> dict[str, Tensor]:
        """A sum over the step's number of examples."""
        loss_B = self.losses(tuple(map(at_least_fp32, output.predictions)), batch.label_B)
        return {self.loss_name: loss_B.sum() / batch.examples_in_step}

    def check_run(self, config: Any) -> None:
        """The teacher is there, and fits. Raises `UserError`."""
        if config.distillation is not None:
            check_teacher(config.distillation.teacher, config)
            self._rehearsed(config.distillation.teacher)

    def check_new_run(self, config: Any) -> None:
        """What it starts from is there, and fits. Raises `UserError`."""
        check_start(self._start, config.model, config.data)
        with torch.device("meta"):
            model = self.build_model(config.model, self._shape_of_run(config, SingleWorld()))
        rehearse_start(model, config.model, self._start, self.encoder, self._rehearsed)

    def first_weights(self, model: BertModel, settings: BertConfig) -> None:
        """Those of the encoder or of the run that the configuration names, converted where there are experts."""
        fill_from_start(
            model,
            settings,
            self._start,
            self.encoder,
            open_run=lambda path: self.trained(path, SingleWorld()),
            importance=self._importance,
        )

    def trained(self, run: Path, world: World) -> BertModel:
        """The model of a finished run, fp32, with this rank's experts. Raises UserError if it is not intact."""
        return self._of_run(run, world, torch.device("cpu"))

    def _rehearsed(self, run: Path) -> BertModel:
        """The whole of it without storage: its weights are there and fit."""
        return self._of_run(run, SingleWorld(), torch.device("meta"))

    def _of_run(self, run: Path, world: World, device: torch.device) -> BertModel:
        weights = find_weights(run)
        found, fitting = weights.config.model, self.settings
        if not isinstance(found, fitting):
            wanted = fitting.model_fields["name"].default
            raise UserError(f"{run} is a run of model.name={found.name}, not of {wanted}; name one of {wanted}")
        with device:
            model: BertModel = self.build_model(found, self._shape_of_run(weights.config, world))
        weights.load(model)
        return model

    def _shape_of_run(self, config: Any, world: World) -> RunShape:
        steps_per_epoch = max(len(self.train) // config.train.batch_size, 1)
        context = GateContext(self.id_counts(), config.train.total_steps(steps_per_epoch))
        return RunShape(world, steps_per_epoch, context)

    @abstractmethod
    def build_model(self, model: Any, run: RunShape) -> BertModel: ...

    def _importance(self, model: BertModel) -> Tensor:
        """In fp64, so that the order of neurons does not depend on how ranks share out the examples."""
        environment = LaunchEnvironment.read()
        examples = np.arange(min(self._start.importance_examples, len(self.train)))
        shares = shard_batches(examples, self.eval_batch, rank=environment.rank, world_size=environment.world_size)
        batches = (self.train.batch(index_B, examples).to(environment.device) for index_B in shares)
        importance_LH = neuron_importance(
            model.double().to(environment.device),
            batches,
            inputs=lambda batch: batch.inputs,
            losses=lambda output, batch: self.losses(output.predictions, batch.label_B),
        )
        return sum_over_ranks(importance_LH).cpu()

    def id_counts(self) -> Tensor:
        return self._token_counts

    @cached_property
    def _token_counts(self) -> Tensor:
        return torch.from_numpy(np.bincount(self.train.token_M, minlength=self.encoder.shape.vocab))


def _check_fit(data: TextData, encoder: Encoder) -> None:
    shape, longest = encoder.shape, data.manifest["max_length"]
    if longest > shape.positions:
        raise UserError(f"data.max_length={longest}: the encoder has {shape.positions} positions; give at most so many")
    if data.vocabulary > shape.vocab:
        raise UserError(
            f"data.tokenizer knows {data.vocabulary} tokens, the encoder {shape.vocab}; leave it out to have the "
            f"encoder's own"
        )
    if data.train.has_pairs and shape.segments < 2:
        name = data.manifest["name"]
        raise UserError(f"start.encoder knows {shape.segments} segment(s); the pairs of data.name={name} need 2")
