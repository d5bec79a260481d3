"""BERT checkpoints as Hugging Face keeps them, there and back: ``config.json`` and ``model.safetensors``.

    checkpoint = read_hugging_face(directory)                # BertModel, BertForSequenceClassification, ...
    model = BertClassifierConfig(moe_every=0).build(checkpoint.shape, num_labels, run)
    checkpoint.into(model)                                   # its head stays as it is where there is none
    write_hugging_face(model, other)                         # as BertForSequenceClassification, ...QuestionAnswering
    write_hugging_face(model, other, like=checkpoint)        # as it was read, to the bit

Every tensor of a file is accounted for by name: it is a parameter of ours, a constant that is checked, or of the
heads of pre-training, which ``left_out`` names. Anything else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.models.bert.classifier import BertClassifier
from dist_moe.models.bert.model import ABOVE, AUXILIARY, BertModel
from dist_moe.models.bert.shape import BertShape
from dist_moe.models.hugging_face.files import WEIGHTS, check_names, read_config, read_tensors, write_directory

PREFIX = "bert."
POSITION_IDS = "embeddings.position_ids"
HEADS = ("classifier.", "qa_outputs.")
"""How names begin that never have the prefix."""

_MODULES = {
    "encoder.embeddings.token": "embeddings.word_embeddings",
    "encoder.embeddings.position": "embeddings.position_embeddings",
    "encoder.embeddings.segment": "embeddings.token_type_embeddings",
    "encoder.embeddings.norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
    "classifier": "classifier",
    "span": "qa_outputs",
}
_OF_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward.norm": "output.LayerNorm",
}
_WITHOUT_BIAS = ("encoder.embeddings.token", "encoder.embeddings.position", "encoder.embeddings.segment")
_PRE_TRAINING_HEADS = frozenset(
    f"cls.{name}"
    for name in (
        "predictions.bias",
        *(f"predictions.transform.{part}.{kind}" for part in ("dense", "LayerNorm") for kind in ("weight", "bias")),
        *(f"{part}.{kind}" for part in ("predictions.decoder", "seq_relationship") for kind in ("weight", "bias")),
    )
)


@dataclass(frozen=True)
class BertCheckpoint:
    """``weights``: by our names. ``config``: the content of config.json. ``left_out``: names without a use here.

    ``prefixed``: whether names begin with "bert."; ``has_position_ids``: whether the constant 0, 1, ... is kept.
    """

    shape: BertShape
    weights: dict[str, Tensor]
    config: dict[str, Any]
    left_out: tuple[str, ...]
    prefixed: bool
    has_position_ids: bool

    def into(self, model: BertModel) -> None:
        """Fill a dense model; its head keeps its first values if the checkpoint has none.

        Raises UserError if the sizes differ, for example the number of labels.
        """
        model.place(self.weights)


def name_map(layers: int) -> dict[str, str]:
    """Their name, without the prefix, of every parameter that a dense model with so many layers may have."""
    modules = _MODULES | {
        f"encoder.layers.{layer}.{ours}": f"encoder.layer.{layer}.{theirs}"
        for layer in range(layers)
        for ours, theirs in _OF_LAYER.items()
    }
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in modules.items()
        for kind in (("weight",) if ours in _WITHOUT_BIAS else ("weight", "bias"))
    }


def read_shape(directory: Path) -> BertShape:
    """The sizes alone, from ``config.json``. Raises UserError for a directory that is no BERT encoder's."""
    return BertShape.from_hugging_face(read_config(directory))


def read_hugging_face(directory: Path) -> BertCheckpoint:
    """A BERT checkpoint directory, whatever of ours stands above its encoder.

    Raises UserError for a directory that is none, naming every tensor that is missing or unknown.
    """
    config = read_config(directory)
    shape = BertShape.from_hugging_face(config)
    found = read_tensors(directory)
    prefixed = any(name.startswith(PREFIX) for name in found)
    tensors = {_plain(name): tensor for name, tensor in found.items()}
    position_ids = tensors.pop(POSITION_IDS, None)
    if position_ids is not None and position_ids.flatten().tolist() != list(range(shape.positions)):
        raise UserError(f"{directory / WEIGHTS}: {POSITION_IDS} is not 0..{shape.positions - 1}")
    left_out = tuple(sorted(tensors.keys() & _PRE_TRAINING_HEADS))
    names = name_map(shape.layers)
    _check_names(directory, tensors.keys() - set(left_out), names)
    weights = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    return BertCheckpoint(shape, weights, config, left_out, prefixed, position_ids is not None)


def write_hugging_face(model: BertModel, directory: Path, like: BertCheckpoint | None = None) -> None:
    """Write a dense model as a directory that transformers loads, with its head, or ``like`` another one.

    ``like``: the checkpoint whose names and config.json are used; without a head if that has none.
    An auxiliary head is left out. Raises UserError for a model with experts, or if the directory has weights already
    or cannot be written.
    """
    if len(model.dense_layers()) < model.shape.layers:
        raise UserError("a model with experts is no BertModel; write a dense one")
    names = name_map(model.shape.layers)
    tensors: dict[str, Tensor] = {
        _written(names[name], like): parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(AUXILIARY) and (like is None or name in like.weights)
    }
    if like is not None and like.has_position_ids:
        tensors[_written(POSITION_IDS, like)] = torch.arange(model.shape.positions).unsqueeze(0)
    write_directory(directory, _config(model, like), tensors)


def _config(model: BertModel, like: BertCheckpoint | None) -> dict[str, Any]:
    sizes = model.shape.to_hugging_face()
    if like is not None:
        return like.config if like.shape == model.shape else like.config | sizes
    dropout = {"hidden_dropout_prob": model.dropout, "attention_probs_dropout_prob": model.dropout}
    return sizes | dropout | _head_config(model)


def _head_config(model: BertModel) -> dict[str, Any]:
    if not isinstance(model, BertClassifier):
        return {"architectures": ["BertForQuestionAnswering"]}
    labels = {f"LABEL_{i}": i for i in range(model.num_labels)}
    named = {str(i): label for label, i in labels.items()}
    return {"architectures": ["BertForSequenceClassification"], "label2id": labels, "id2label": named}


def _written(name: str, like: BertCheckpoint | None) -> str:
    prefixed = like is None or like.prefixed
    return PREFIX + name if prefixed and not name.startswith(HEADS) else name


def _plain(name: str) -> str:
    """Without the prefix, and with today's names for the oldest checkpoints' scale and shift."""
    name = name.removeprefix(PREFIX)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _check_names(directory: Path, found: set[str], names: dict[str, str]) -> None:
    """Of what stands above the encoder, each part is there as a whole or not at all."""
    of_parts = [{theirs for ours, theirs in names.items() if ours.startswith(part)} for part in ABOVE]
    absent = set[str]().union(*(part for part in of_parts if not part & found))
    check_names(directory, found, set(names.values()) - absent, "a BERT encoder with what stands above it")
