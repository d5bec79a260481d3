"""The encoder that models of text are built on, and the weights that their runs begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_moe.data.encoder import open_encoder
from dist_moe.data.labelled_text import LabelledTextConfig, QuestionsConfig
from dist_moe.errors import UserError
from dist_moe.models import BertConfig, BertModel, BertShape
from dist_moe.models.bert import read_hugging_face
from dist_moe.models.conversion import convert_bert, place_converted
from dist_moe.recipes.supervised.config import RunConfig
from dist_moe.recipes.supervised.runs import find_weights
from dist_moe.recipes.supervised.start.bert_config import TextStartConfig


@dataclass(frozen=True)
class Encoder:
    """A checkpoint directory, its sizes, and where it came from (never a path)."""

    directory: Path
    shape: BertShape
    provenance: dict[str, Any]

    @property
    def tokenizer(self) -> Path:
        """Of the library tokenizers."""
        return self.directory / "tokenizer.json"


def find_encoder(start: TextStartConfig, cache: Path | None, *, progress: bool) -> Encoder:
    """The encoder that ``start`` names, fetched if it is not given. Raises `UserError`."""
    source = open_encoder(start.encoder, cache, progress=progress)
    path = source.directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return Encoder(source.directory, BertShape.from_hugging_face(content), source.provenance)


def check_start(start: TextStartConfig, model: BertConfig, data: LabelledTextConfig | QuestionsConfig) -> None:
    """Raises `UserError` for a start from which ``model`` cannot begin on ``data``, without a look at weights."""
    if start.run is not None:
        trained = find_weights(start.run).config
        if trained.model.num_moe_layers:
            raise UserError(f"start.run={start.run}: its model has experts; name a run with model.moe_every=0")
        if getattr(trained.data, "name", None) == data.name:
            _check_same_split("start.run", start.run, trained.data, data)
    elif _needs_importance(start, model):
        without = "start.conversion.order=random"
        if model.hidden is None:
            without += " or start.conversion.method=copies"
        raise UserError(
            f"start.run is not given, and start.conversion.order={start.conversion.order} needs it: what matters is "
            f"known only of a dense model that was trained on the task. Remedy: train one with model.moe_every=0 and "
            f"name its run, or set {without}"
        )


def check_teacher(run: Path, config: RunConfig) -> None:
    """Raises `UserError` for a teacher of another task or split, or whose experts these ranks cannot share."""
    teacher = find_weights(run).config
    _check_same_split("distillation.teacher", run, teacher.data, config.data)
    size = config.parallel.expert_parallel_size
    if teacher.model.num_moe_layers and teacher.model.num_experts % size:
        raise UserError(
            f"parallel.expert_parallel_size={size} does not divide the {teacher.model.num_experts} experts of "
            f"distillation.teacher={run}"
        )


def _check_same_split(field: str, run: Path, theirs: Any, ours: Any) -> None:
    """With another split, texts to validate and test on here were among those that the run learnt from."""
    for name in ("name", "graded", "seed"):
        there, here = getattr(theirs, name, None), getattr(ours, name, None)
        if there != here:
            raise UserError(
                f"{field}={run} was trained with data.{name}={there}, not {here}; name a run of the same task and split"
            )


def rehearse_start(
    model: BertModel,
    settings: BertConfig,
    start: TextStartConfig,
    encoder: Encoder,
    open_run: Callable[[Path], BertModel],
) -> None:
    """:func:`fill_from_start` on a ``model`` without storage: raises its `UserError` while there is nothing to lose.

    Which neurons are taken decides no shape, so none are measured.
    """
    conversion = start.conversion.model_copy(update={"order": "random", "noise": 0.0})
    plain = start.model_copy(update={"conversion": conversion})
    try:
        fill_from_start(model, settings, plain, encoder, open_run, importance=_unmeasured)
    except UserError as error:
        raise UserError(f"start: {error}") from error


def _unmeasured(model: BertModel) -> Tensor:
    raise AssertionError("a random order needs no importance")


def fill_from_start(
    model: BertModel,
    settings: BertConfig,
    start: TextStartConfig,
    encoder: Encoder,
    open_run: Callable[[Path], BertModel],
    importance: Callable[[BertModel], Tensor],
) -> None:
    """Give a new run's ``model`` its first weights; gates, and a head that there is not, keep theirs.

    ``open_run``: the model of a finished run; ``importance``: (layers, H) of its neurons, the same on all
    ranks. Raises `UserError` for weights that do not fit.
    """
    if start.run is None:
        checkpoint = read_hugging_face(encoder.directory)
        dense, shape, importance_LH = checkpoint.weights, checkpoint.shape, None
    else:
        trained = open_run(start.run)
        dense, shape = dict(trained.named_parameters()), trained.shape
        importance_LH = importance(trained) if _needs_importance(start, settings) else None
    place_converted(model, convert_bert(dense, shape, settings, start.conversion, importance_LH))


def _needs_importance(start: TextStartConfig, model: BertConfig) -> bool:
    if start.conversion.order == "random":
        return False
    return model.hidden is not None or (model.moe_every > 0 and start.conversion.method == "partition")
