"""What supervised training needs to know of a data set and the model that fits it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_moe.data.batches import Examples
from dist_moe.models import ModelOutput, MoEModel, RunShape

Figures = dict[str, float]
Columns = NDArray[np.float64]


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in the precision in which losses are computed: its own, or fp32 if that is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class ExampleShape:
    """Of one example, for plans. ``tokens``: rows that are routed, on average. ``places``: of the row that attention
    sees, at most, with what shorter examples are filled up with."""

    tokens: float = 1.0
    places: int = 1


class Problem(ABC):
    """A data set of one or several tasks, its model, its losses and its figures.

    ``train``, ``val``, ``test``: tables of examples. ``manifest``: where the data came from. ``eval_batch``:
    examples that a rank evaluates at once. ``tokens_per_example``: rows that are routed for each.
    """

    eval_batch = 4096
    tokens_per_example = 1

    train: Examples[Any]
    val: Examples[Any]
    test: Examples[Any]
    manifest: dict[str, Any]

    @abstractmethod
    def build_model(self, model: Any, run: RunShape) -> MoEModel:
        """This rank's part of the model that the section ``model`` describes; all ranks must have seeded
        torch alike."""

    def check_run(self, config: Any) -> None:  # noqa: B027 (most need nothing)
        """Raise UserError for what a run of the configuration, new or resumed, could not train with."""

    def check_new_run(self, config: Any) -> None:  # noqa: B027 (most begin anywhere)
        """Raise UserError for what a new run of the configuration could not begin with."""

    def first_weights(self, model: Any, settings: Any) -> None:  # noqa: B027 (most begin with random ones)
        """Give the model of a new run, built from the section ``settings``, what it starts from. Collective."""

    def example_shape(self) -> ExampleShape:
        """How large an example is."""
        return ExampleShape(self.tokens_per_example, self.tokens_per_example)

    @abstractmethod
    def id_counts(self) -> Tensor:
        """(ids,) how often each id that a gate can route by occurs in the training examples."""

    @abstractmethod
    def task_losses(self, output: ModelOutput, batch: Any) -> dict[str, Tensor]:
        """The tasks' losses by name, in order: sums over the batch divided by the size of the whole step."""

    @abstractmethod
    def observe(self, output: ModelOutput, batch: Any) -> Tensor:
        """(C, B) fp64 columns from which :meth:`figures` can be computed exactly over a data set."""

    @abstractmethod
    def figures(self, columns: Columns, part: Any, weights: tuple[float, ...]) -> Figures:
        """Figures of (C, N) observed columns of all rows of ``part``; "loss" is the weighted task loss."""

    def baselines(self, part: Any, weights: tuple[float, ...]) -> dict[str, Figures]:
        """Figures of predictors that a model must beat, by name."""
        return {}

    def costs(self, model: Any, figures: Mapping[str, Any]) -> dict[str, Any]:
        """What a summary shall say of the model's size and of the work per token, given its test figures."""
        return {}

    def closing_words(self, model: Any) -> str:
        """What to print when training has ended, beside the table of figures. Collective over all ranks."""
        return ""

    def weighted(self, losses: dict[str, Tensor], weights: tuple[float, ...]) -> Tensor:
        """The weighted sum of the tasks' losses."""
        return torch.stack([w * loss for w, loss in zip(weights, losses.values(), strict=True)]).sum()
