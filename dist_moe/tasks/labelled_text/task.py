"""Tasks of labelled texts, for models on a BERT encoder."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dist_moe.data.labelled_text import LabelledBatch, LabelledTable
from dist_moe.errors import UserError
from dist_moe.models import ModelOutput
from dist_moe.tasks.labelled_text.encoder import Encoder
from dist_moe.tasks.objective import at_least_fp32
from dist_moe.tasks.task import Categories, ExampleShape, Task


class TextData(Protocol):
    """A prepared data set."""

    @property
    def train(self) -> LabelledTable:
        """Training examples."""

    @property
    def val(self) -> LabelledTable:
        """Validation examples."""

    @property
    def test(self) -> LabelledTable:
        """Test examples."""

    @property
    def vocabulary(self) -> int:
        """How many ids the tokenizer has."""

    @property
    def tokenizer(self) -> str:
        """A digest of the tokenizer."""

    @property
    def manifest(self) -> dict[str, Any]:
        """Where the data came from."""


class LabelledTextTask(Task):
    """Labelled texts with one target; gates that route by identity see the token.

    ``classes``: names, where classes are predicted. ``loss_name``: under which the target's loss is recorded.
    Raises UserError if texts or tokens do not fit the encoder.
    """

    eval_batch = 64

    classes: tuple[str, ...] = ()
    train: LabelledTable

    def __init__(self, data: TextData, encoder: Encoder) -> None:
        _check_fit(data, encoder)
        self.train, self.val, self.test = data.train, data.val, data.test
        self.manifest: dict[str, Any] = data.manifest | {"encoder": encoder.provenance}
        self.encoder = encoder
        self._tokenizer = data.tokenizer

    def digests(self) -> dict[str, str]:
        """Return those of the files, of the texts and their split, of the tokenizer and of the encoder's sizes."""
        found = super().digests()
        encoder = {"encoder": found.pop("sizes")}
        return found | encoder | {"split": self.manifest["split"], "tokenizer": self._tokenizer}

    def example_shape(self) -> ExampleShape:
        """Return tokens of the mean training text and places of the longest: a batch is as wide as its longest text."""
        length_N = self.train.length_N
        return ExampleShape(float(length_N.mean()), int(length_N.max()))

    @property
    @abstractmethod
    def loss_name(self) -> str:
        """The name of the target's loss."""

    @abstractmethod
    def losses(self, predictions: tuple[Tensor, ...], label_B: Tensor) -> Tensor:
        """Return (B,): the loss of each example, in the precision of ``predictions``."""

    def task_losses(self, output: ModelOutput, batch: LabelledBatch) -> dict[str, Tensor]:
        """Return the sum of the losses over the step's number of examples."""
        loss_B = self.losses(tuple(map(at_least_fp32, output.predictions)), batch.label_B)
        return {self.loss_name: loss_B.sum() / batch.examples_in_step}

    def categories(self, part: LabelledTable) -> Categories | None:
        """Return the class of each text, where classes are predicted."""
        return Categories(self.classes, np.asarray(part.target_N)) if self.classes else None

    def example_of_token(self, batch: LabelledBatch) -> Tensor:
        """Return the text of each token, without what shorter texts are filled up with."""
        return torch.arange(len(batch)).repeat_interleave(batch.length_B.cpu())

    def id_counts(self) -> Tensor:
        """Return how often each token occurs."""
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
        raise UserError(f"data.encoder knows {shape.segments} segment(s); the pairs of data.name={name} need 2")
