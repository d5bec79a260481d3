"""The encoder that models of text are built on, and the weights that their runs begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_moe.data.encoder_sources import open_encoder
from dist_moe.errors import UserError
from dist_moe.models import BertConfig, BertModel, BertShape
from dist_moe.models.bert import read_hugging_face
from dist_moe.models.conversion import convert_bert, place_converted
from dist_moe.recipes.text_start_config import TextStartConfig
from dist_moe.recipes.weights import find_weights


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


def check_start(start: TextStartConfig, model: BertConfig) -> None:
    """Raises `UserError` for a start from which ``model`` cannot begin, before any process group exists."""
    if start.run is not None:
        if find_weights(start.run).config.model.num_moe_layers:
            raise UserError(f"start.run={start.run}: its model has experts; name a run with model.moe_every=0")
    elif _needs_importance(start, model):
        raise UserError(
            "start.run is not given, and start.conversion.order=importance needs it: what matters is known only of a "
            "dense model that was trained on the task. Remedy: train one with model.moe_every=0 and name its run, or "
            "set start.conversion.order=random or start.conversion.method=copies"
        )


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
