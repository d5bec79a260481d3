"""BERT checkpoints as Hugging Face keeps them, there and back: ``config.json`` and ``model.safetensors``.

    checkpoint = read_hugging_face(directory)                # BertModel, BertForSequenceClassification, ...
    model = BertClassifierConfig(moe_every=0).build(checkpoint.shape, num_labels, run)
    checkpoint.into(model)                                   # its head stays as it is where there is none
    write_hugging_face(model, other)                         # as BertForSequenceClassification, ...QuestionAnswering
    write_hugging_face(model, other, like=checkpoint)        # as it was read, to the bit
    write_with_experts(model, config, other)                 # see hugging_face_experts

Every tensor of a file is accounted for by name: it is a parameter of ours, a constant that is checked, or of the
heads of pre-training, which ``left_out`` names. Anything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.models.bert.answerer import BertAnswerer
from dist_moe.models.bert.classifier import BertClassifier
from dist_moe.models.bert.model import ABOVE, AUXILIARY, BertModel
from dist_moe.models.bert.shape import BertShape
from dist_moe.models.hugging_face.files import (
    WEIGHTS,
    check_names,
    dtype_fields,
    read_config,
    read_tensors,
    tensors_of,
    write_directory,
)

PREFIX = "bert."
POSITION_IDS = "embeddings.position_ids"
HEADS = ("classifier.", "qa_outputs.")
"""How names begin that never have the prefix."""
HEADS_OF_OURS = (BertClassifier.head, BertAnswerer.head)

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
        """Fill a dense model; its pooler and its head keep their first values if the checkpoint has none.

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


def write_hugging_face(
    model: BertModel,
    directory: Path,
    like: BertCheckpoint | None = None,
    *,
    labels: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    padding: int | None = None,
) -> str:
    """Write a dense model as a directory that transformers loads, with its head, or ``like`` another one.

    ``like``: the checkpoint whose names and config.json are used; without a head if that has none. Without it:
    ``labels``: names of a classifier's classes, in the order of their numbers; ``dtype``: of the parameters (None: as
    they are); ``padding``: the id that fills rows up. An auxiliary head is left out. Returns the name of
    transformers' class.
    Raises UserError for a model with experts, for one whose head ``like`` has not but another, or if the directory has
    weights already or cannot be written; for another number of labels than the model has.
    """
    if len(model.dense_layers()) < model.shape.layers:
        raise UserError("a model with experts is no BertModel; write it with write_with_experts")
    others = [head for head in HEADS_OF_OURS if like is not None and _has(like, head)]
    if others and model.head not in others:
        raise UserError(f"the model's head is {model.head}*, that of like is {others[0]}*; write it without like")
    names = name_map(model.shape.layers)
    tensors: dict[str, Tensor] = {
        written_name(names[name], prefixed=like is None or like.prefixed): tensor
        for name, tensor in tensors_of(model, dtype, {}).items()
        if not name.startswith(AUXILIARY) and (like is None or name in like.weights)
    }
    if like is not None and like.has_position_ids:
        tensors[written_name(POSITION_IDS, prefixed=like.prefixed)] = torch.arange(model.shape.positions).unsqueeze(0)
    content = config_of(model, labels, dtype, padding) if like is None else _config_like(model, like)
    write_directory(directory, content, tensors)
    return class_of(model)


def _has(checkpoint: BertCheckpoint, part: str) -> bool:
    return any(name.startswith(part) for name in checkpoint.weights)


def config_of(
    model: BertModel, labels: Sequence[str], dtype: torch.dtype | None, padding: int | None
) -> dict[str, Any]:
    """The content of ``config.json``. No ``labels``: LABEL_0, LABEL_1, ... Raises UserError for too few or too many."""
    dropout = {"hidden_dropout_prob": model.dropout, "attention_probs_dropout_prob": model.dropout}
    content = model.shape.to_hugging_face() | dropout | {"architectures": [class_of(model)], "pad_token_id": padding}
    content |= dtype_fields(dtype or model.encoder.embeddings.token.weight.dtype)
    return content | (_label_fields(model, labels) if isinstance(model, BertClassifier) else {})


def class_of(model: BertModel) -> str:
    """transformers' name of a BERT with the same head."""
    return "BertForSequenceClassification" if isinstance(model, BertClassifier) else "BertForQuestionAnswering"


def written_name(name: str, *, prefixed: bool = True) -> str:
    """``name`` as a checkpoint with a head has it."""
    return PREFIX + name if prefixed and not name.startswith(HEADS) else name


def _config_like(model: BertModel, like: BertCheckpoint) -> dict[str, Any]:
    return like.config if like.shape == model.shape else like.config | model.shape.to_hugging_face()


def _label_fields(model: BertClassifier, labels: Sequence[str]) -> dict[str, Any]:
    named = dict(enumerate(labels or (f"LABEL_{i}" for i in range(model.num_labels))))
    if len(named) != model.num_labels:
        raise UserError(f"labels={list(labels)}: the model has {model.num_labels}; name each of them")
    kind = "regression" if model.num_labels == 1 else "single_label_classification"
    return {
        "id2label": {str(i): label for i, label in named.items()},
        "label2id": {label: i for i, label in named.items()},
        "problem_type": kind,
    }


def _plain(name: str) -> str:
    """Without the prefix, and with today's names for the oldest checkpoints' scale and shift."""
    name = name.removeprefix(PREFIX)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _check_names(directory: Path, found: set[str], names: dict[str, str]) -> None:
    """Of what stands above the encoder, each part is there as a whole or not at all."""
    of_parts = [{theirs for ours, theirs in names.items() if ours.startswith(part)} for part in ABOVE]
    absent = set[str]().union(*(part for part in of_parts if not part & found))
    check_names(directory, found, set(names.values()) - absent, "a BERT encoder with what stands above it")
