"""Tasks: data, losses and metrics of what a model learns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.batches import Examples
from dist_moe.data.digests import digest_of_content
from dist_moe.data.prepared import PARTS, digests_by_part
from dist_moe.engine.settings import TrainConfig
from dist_moe.gates import GateContext
from dist_moe.models import ModelOutput, MoEModelConfig, RunShape
from dist_moe.parallel import World

Metrics = dict[str, float]
Columns = NDArray[np.float64]

PredictionKind = Literal["classes", "binary", "number"]
"""Meaning of a prediction: logits of classes on its last axis, logits of yes or no, or numbers."""


@dataclass(frozen=True)
class ExampleShape:
    """The size of an example, for plans. ``tokens``: rows that are routed, on average. ``places``: length of the row
    that attention sees, at most, with what shorter examples are filled up with."""

    tokens: float = 1.0
    places: int = 1


@dataclass(frozen=True)
class Categories:
    """Kinds of examples by name, and ``kind_N``: int64, the number of the kind of each example of a part."""

    names: tuple[str, ...]
    kind_N: NDArray[np.int64]


class Watch(ExitStack):
    """Looks on while a model is evaluated, by default at nothing; what it has put on the model it takes off at exit."""

    def see(self, output: ModelOutput) -> None:
        """Take what the model gave for a batch of this rank."""

    def end(self, columns: Columns, part: Any) -> dict[str, Any]:
        """Return what was seen, to stand among the metrics: values that JSON can hold. Collective over all ranks.

        ``columns``: (C, N) observed columns of all rows of ``part``.
        """
        return {}


class Task(ABC):
    """A data set with the losses and metrics of one or several targets. Knows no run and no recipe.

    ``train``, ``val``, ``test``: tables of examples. ``manifest``: where the data came from, if known. ``eval_batch``:
    examples that a rank evaluates at once. ``tokens_per_example``: rows that are routed for each. ``kind``: models of
    the same kind fit. ``headlines``: metrics that the line about an evaluation has, None: all.
    """

    kind: ClassVar[str]
    headlines: ClassVar[tuple[str, ...] | None] = None

    eval_batch = 4096
    tokens_per_example = 1

    train: Examples[Any]
    val: Examples[Any]
    test: Examples[Any]
    manifest: dict[str, Any] = {}  # noqa: RUF012 (a task has its own, or nothing to say)

    def model_inputs(self) -> dict[str, Any]:
        """Return the sizes that a model of the task's kind is built with: keyword arguments of its ``build``."""
        return {}

    def digests(self) -> dict[str, str]:
        """Return digests by name that tell these data from any other; a run whose data have others is another run.

        Of prepared data they are those of the files that its manifest names, else those of the tables in memory, and
        in either case of the sizes for models. A task whose tables only say where examples lie overrides this.
        """
        files = self.manifest.get("files")
        parts = {part: digest_of_content(getattr(self, part)) for part in PARTS} if files is None else {}
        sizes = {"sizes": digest_of_content(self.model_inputs())}
        version = self.manifest.get("format_version")  # of the code that prepared them
        preparation = {} if version is None else {"preparation": str(version)}
        return preparation | digests_by_part(files or {}) | parts | sizes

    def build_model(self, model: MoEModelConfig, run: RunShape) -> Any:
        """Return this rank's part of the model that ``model`` describes; all ranks must have seeded torch alike."""
        return model.build(run=run, **self.model_inputs())

    def example_shape(self) -> ExampleShape:
        """Return how large an example is."""
        return ExampleShape(self.tokens_per_example, self.tokens_per_example)

    @property
    def prediction_kinds(self) -> tuple[PredictionKind, ...]:
        """The kind of each of a model's predictions, by which a student follows a teacher's; empty: not known.

        They are in the order of the targets, equally many for each.
        """
        return ()

    def id_counts(self) -> Tensor | None:
        """Return (ids,) int64: how often each id that a gate can route by occurs in training; None: no ids."""
        return None

    @abstractmethod
    def task_losses(self, output: ModelOutput, batch: Any) -> dict[str, Tensor]:
        """Return the targets' losses by name, in order: sums over the batch divided by the size of the whole step."""

    @abstractmethod
    def observe(self, output: ModelOutput, batch: Any) -> Tensor:
        """Return (C, B) fp64 columns from which :meth:`metrics` can be computed exactly over a data set."""

    @abstractmethod
    def metrics(self, columns: Columns, part: Any, weights: tuple[float, ...]) -> Metrics:
        """Return the metrics of (C, N) observed columns of all rows of ``part``; "loss" is the weighted loss."""

    def undefined(self, part: Any, weights: tuple[float, ...]) -> dict[str, str]:
        """Return why metrics have no value on ``part``, by their names: from its labels, whatever a model predicts.

        They are null wherever metrics are written. "loss" is among them where no label of ``part`` decides it.
        """
        return {}

    def baselines(self, part: Any, weights: tuple[float, ...]) -> dict[str, Metrics]:
        """Return the metrics of predictors that a model must beat, by name."""
        return {}

    def categories(self, part: Any) -> Categories | None:
        """Return what kind each example of ``part`` is, for pictures of what each expert sees; None: not known."""
        return None

    def example_of_token(self, batch: Any) -> Tensor:
        """Return (T,) int64: the example of ``batch`` to which each token belongs that MoE layers route."""
        return torch.arange(len(batch)).repeat_interleave(self.tokens_per_example)

    def words(self, batch: Any) -> list[str] | None:
        """Return each token of ``batch`` as a person reads it, in the order of routing; None: they have no names."""
        return None

    def watch(self, model: Any) -> Watch:
        """Return what looks on while ``model`` is evaluated."""
        return Watch()

    def draw(self, directory: Path, metrics: Mapping[str, Any]) -> None:  # noqa: B027 (most have no pictures)
        """Draw pictures of the test's ``metrics`` into the run's directory, on rank 0. Raises OSError."""

    def costs(self, model: Any, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the model's size and work per token for the summary, given its test metrics."""
        return {}

    def final_report(self, model: Any) -> str:
        """Return what to print when training has ended, beside the table of metrics. Collective over all ranks."""
        return ""


class ModelRun(Protocol):
    """The part of a configuration that a model is built from."""

    @property
    def model(self) -> MoEModelConfig:
        """The section of the model."""

    @property
    def train(self) -> TrainConfig:
        """Length and batch size."""

    @property
    def seed(self) -> int:
        """The seed of the initial weights."""


def build_model(config: ModelRun, task: Task, world: World) -> Any:
    """Return this rank's part of the model for ``task``; dense parameters are alike on all ranks."""
    torch.manual_seed(config.seed)
    return task.build_model(config.model, run_shape(config, task, world))


def run_shape(config: ModelRun, task: Task, world: World) -> RunShape:
    """Return what the model of a run on ``task`` may need to know of it."""
    steps_per_epoch = max(len(task.train) // config.train.batch_size, 1)
    context = GateContext(task.id_counts(), config.train.total_steps(steps_per_epoch))
    return RunShape(world, steps_per_epoch, context)
