"""BERT checkpoints as Hugging Face keeps them, there and back: ``config.json`` and ``model.safetensors``.

    checkpoint = read_hugging_face(directory)                # BertModel, BertForSequenceClassification, ...
    model = BertClassifierConfig(moe_every=0).build(checkpoint.shape, num_labels, run)
    checkpoint.into(model)                                   # the classifier stays as it is where there is none
    write_hugging_face(model, other)                         # as BertForSequenceClassification
    write_hugging_face(model, other, like=checkpoint)        # as it was read, to the bit

Every tensor of a file is accounted for by name: it is a parameter of ours, a constant that is checked, or of the
heads of pre-training, which a classifier leaves out and ``left_out`` names. Anything else is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.models.bert.classifier import BertClassifier
from dist_moe.models.bert.shape import BertShape
from dist_moe.models.hugging_face.files import WEIGHTS, check_names, read_config, read_tensors, write_directory
from dist_moe.models.placed_weights import place_weights

PREFIX = "bert."
POSITION_IDS = "embeddings.position_ids"
CLASSIFIER = "classifier."

_MODULES = {
    "encoder.embeddings.token": "embeddings.word_embeddings",
    "encoder.embeddings.position": "embeddings.position_embeddings",
    "encoder.embeddings.segment": "embeddings.token_type_embeddings",
    "encoder.embeddings.norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
    "classifier": "classifier",
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

    @property
    def has_classifier(self) -> bool:
        return any(name.startswith(CLASSIFIER) for name in self.weights)

    def into(self, model: BertClassifier) -> None:
        """Fill a dense model; its classifier keeps its first values if the checkpoint has none.

        Raises UserError if the sizes differ, for example the number of labels.
        """
        place_weights(model, self.weights, () if self.has_classifier else (CLASSIFIER,))


def name_map(layers: int) -> dict[str, str]:
    """Their name, without the prefix, of every parameter of a dense :class:`BertClassifier` with so many layers."""
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


def read_hugging_face(directory: Path) -> BertCheckpoint:
    """A BERT checkpoint directory, with or without a classifier.

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
    _check_names(directory, tensors.keys() - set(left_out), set(names.values()))
    weights = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    return BertCheckpoint(shape, weights, config, left_out, prefixed, position_ids is not None)


def write_hugging_face(model: BertClassifier, directory: Path, like: BertCheckpoint | None = None) -> None:
    """Write a dense model as a directory that transformers loads: as BertForSequenceClassification, or ``like`` one.

    ``like``: the checkpoint whose names and config.json are used; without a classifier if that has none.
    Raises UserError for a model with experts, or if the directory has weights already or cannot be written.
    """
    if len(model.dense_layers()) < model.shape.layers:
        raise UserError("a model with experts is no BertModel; write a dense one")
    names = name_map(model.shape.layers)
    with_classifier = like is None or like.has_classifier
    tensors: dict[str, Tensor] = {
        _written(names[name], like): parameter
        for name, parameter in model.named_parameters()
        if with_classifier or not name.startswith(CLASSIFIER)
    }
    if like is not None and like.has_position_ids:
        tensors[_written(POSITION_IDS, like)] = torch.arange(model.shape.positions).unsqueeze(0)
    write_directory(directory, _config(model, like), tensors)


def _config(model: BertClassifier, like: BertCheckpoint | None) -> dict[str, Any]:
    sizes = model.shape.to_hugging_face()
    if like is not None:
        return like.config if like.shape == model.shape else like.config | sizes
    labels = {f"LABEL_{i}": i for i in range(model.num_labels)}
    return sizes | {
        "architectures": ["BertForSequenceClassification"],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "label2id": labels,
        "id2label": {str(i): label for label, i in labels.items()},
    }


def _written(name: str, like: BertCheckpoint | None) -> str:
    prefixed = like is None or like.prefixed
    return PREFIX + name if prefixed and not name.startswith(CLASSIFIER) else name


def _plain(name: str) -> str:
    """Without the prefix, and with today's names for the oldest checkpoints' scale and shift."""
    name = name.removeprefix(PREFIX)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _check_names(directory: Path, found: set[str], known: set[str]) -> None:
    classifier = {name for name in known if name.startswith(CLASSIFIER)}
    wanted = known if found & classifier else known - classifier
    check_names(directory, found, wanted, "a BERT encoder with its pooler")
