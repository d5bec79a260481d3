"""BERT checkpoints as Hugging Face keeps them, there and back: ``config.json`` and ``model.safetensors``.

    checkpoint = read_hugging_face(directory)                # BertModel, BertForSequenceClassification, ...
    model = BertClassifierConfig(moe_every=0).build(checkpoint.shape, num_labels, run)
    checkpoint.into(model)                                   # its head stays as it is where there is none
    write_hugging_face(model, other)                         # as BertForSequenceClassification, ...QuestionAnswering
    write_hugging_face(model, other, like=checkpoint)        # as it was read, to the bit
    write_with_experts(model, config, other)                 # an architecture of our own
    AutoModelForSequenceClassification.from_pretrained(other, trust_remote_code=True)

Every tensor of a file is accounted for by name: it is a parameter of ours, a constant that is checked, or of the
heads of pre-training, which ``left_out`` names. Anything else is refused. With experts, tensors of dense parts have
transformers' names, those of MoE layers ours: experts stacked by global id, gates, tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec
from dist_moe.errors import UserError
from dist_moe.experts import FeedForwardBank
from dist_moe.models.bert.encoder import BertShape
from dist_moe.models.bert.model import (
    ABOVE,
    AUXILIARY,
    BertAnswerer,
    BertClassifier,
    BertClassifierConfig,
    BertConfig,
    BertModel,
)
from dist_moe.models.hugging_face.files import (
    BERT,
    CONFIG,
    CONTEXT,
    MIXTURE,
    WEIGHTS,
    Pieces,
    check_names,
    check_specs,
    dtype_fields,
    followed,
    is_constant,
    open_tensors,
    read_config,
    tensors_of,
    write_directory,
)

PREFIX = "bert."
POSITION_IDS = "embeddings.position_ids"
HEADS = ("classifier.", "qa_outputs.")
"""How names begin that never have the prefix."""
MODEL_TYPE = "dist_moe_bert"

_ELSEWHERE = {"name", "auxiliary_head", "hidden", "dropout"}
"""Fields of a model's section that BERT's own say, or that are for training alone."""

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
    """A dense checkpoint. ``weights``: by our names. ``config``: the content of config.json. ``left_out``: names
    without a use here. ``prefixed``: whether names begin with "bert."; ``has_position_ids``: whether the constant
    0, 1, ... is kept."""

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
    """Return their name, without the prefix, of every parameter that a dense model with so many layers may have."""
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
    """Return the sizes alone, from ``config.json``. Raises UserError for a directory that is no BERT encoder's."""
    content = read_config(directory)
    try:
        return BertShape.from_hugging_face(content)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error


def read_hugging_face(directory: Path) -> BertCheckpoint:
    """Return a BERT checkpoint directory, whatever of ours stands above its encoder.

    Raises UserError for a directory that is none, naming every tensor that is missing or unknown.
    """
    config, shape = read_config(directory), read_shape(directory)
    tensors: dict[str, Tensor] = {}
    prefixed, stored = False, open_tensors(directory)
    for name, tensor in stored.without(n for n in stored if is_constant(n) and not n.endswith(POSITION_IDS)).items():
        prefixed |= name.startswith(PREFIX)
        name = name.removeprefix(PREFIX)  # and today's names for the oldest checkpoints' scale and shift
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if name in tensors:
            raise UserError(f"{directory / WEIGHTS} has {name} twice, under two names that mean the same; leave one")
        tensors[name] = tensor
    position_ids = tensors.pop(POSITION_IDS, None)
    if position_ids is not None and position_ids.flatten().tolist() != list(range(shape.positions)):
        raise UserError(f"{directory / WEIGHTS}: {POSITION_IDS} is not 0..{shape.positions - 1}")
    if shape.layers > len(tensors):
        raise UserError(f"{directory / CONFIG} says {shape.layers:,} layers, and there are {len(tensors)} tensors")
    left_out = tuple(sorted(tensors.keys() & _PRE_TRAINING_HEADS))
    names, found = name_map(shape.layers), tensors.keys() - set(left_out)
    wanted = set(names.values())
    for part in ABOVE:  # each part above the encoder is there as a whole or not at all
        of_part = {theirs for ours, theirs in names.items() if ours.startswith(part)}
        wanted -= set() if of_part & found else of_part
    check_names(directory, found, wanted, "a BERT encoder with what stands above it")
    check_specs(directory, {n: TensorSpec.of(t) for n, t in tensors.items()}, _shapes(shape, names, tensors))
    weights = {ours: tensors[theirs] for ours, theirs in names.items() if theirs in tensors}
    return BertCheckpoint(shape, weights, config, left_out, prefixed, position_ids is not None)


def _shapes(shape: BertShape, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes by their names of the parameters that there are; a head has as many rows as it says."""
    width = shape.width
    tables = {"token": shape.vocab, "position": shape.positions, "segment": shape.segments}
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, theirs in names.items():
        if theirs not in tensors:
            continue
        module, _, kind = ours.rpartition(".")
        last = module.rpartition(".")[2]
        head = ours.startswith(("classifier.", "span."))
        rows = tensors[theirs].shape[0] if head and tensors[theirs].dim() else tables.get(last, width)
        rows, columns = (shape.hidden, width) if last == "up" else (rows, shape.hidden if last == "down" else width)
        shapes[theirs] = (rows,) if kind == "bias" or last == "norm" else (rows, columns)
    return shapes


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
    theirs = () if like is None else tuple(like.weights)
    others = [head for head in (BertClassifier.head, BertAnswerer.head) if any(n.startswith(head) for n in theirs)]
    if others and model.head not in others:
        raise UserError(f"the model's head is {model.head}*, that of like is {others[0]}*; write it without like")
    names, prefixed = name_map(model.shape.layers), like is None or like.prefixed
    tensors: dict[str, Tensor] = {
        _written_name(names[name], prefixed): tensor
        for name, tensor in tensors_of(model, dtype, {}).items()
        if not name.startswith(AUXILIARY) and (like is None or name in like.weights)
    }
    if like is not None and like.has_position_ids:
        tensors[_written_name(POSITION_IDS, prefixed)] = torch.arange(model.shape.positions).unsqueeze(0)
    if like is None:
        content = _config_of(model, labels, dtype, padding)
    else:
        content = like.config | ({} if like.shape == model.shape else model.shape.to_hugging_face())
    write_directory(directory, content, {name: Pieces.of(tensor) for name, tensor in tensors.items()})
    return _class_of(model)


def write_with_experts(
    model: BertModel,
    config: BertConfig,
    directory: Path,
    *,
    labels: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    padding: int | None = None,
    total_steps: int | None = None,
    imports: Sequence[str] = (),
) -> str:
    """Write a whole model as a directory that transformers loads where this package is. Returns its class.

    ``config``: the section that it was built by. ``labels``, ``dtype``, ``padding``: see :func:`write_hugging_face`.
    ``total_steps``: of the training run, for gates with a schedule. ``imports``: modules that register gates of one's
    own. An auxiliary head is left out; a table that is still being learnt is rounded as it stands.
    Raises UserError for a dense model, for another number of labels, or if the directory has weights already or cannot
    be written.
    """
    if not model.moe_layers:
        raise UserError("a model without experts is a plain BERT; write it with write_hugging_face")
    model.begin_evaluation()
    bank = next(iter(model.moe_layers.values())).experts
    assert isinstance(bank, FeedForwardBank)
    # The width of experts as it is: it may be a share of a width that the dense layers have no longer.
    section = config.model_dump(mode="json", exclude=_ELSEWHERE) | {"expert_hidden": bank.hidden}
    architecture = f"DistMoE{_class_of(model)}"
    content = _config_of(model, labels, dtype, padding) | {
        "model_type": MODEL_TYPE,
        "architectures": [architecture],
        MIXTURE: section,
        CONTEXT: {"total_steps": total_steps},
        **BERT.fields(imports),
    }
    of_dense, dense = name_map(model.shape.layers), model.dense_layers()
    blocks = tuple(f"encoder.layers.{i}.feed_forward." for i in range(model.shape.layers) if i not in dense)
    tensors = {}
    for ours, tensor in tensors_of(model, dtype, {}).items():
        if not ours.startswith(AUXILIARY):
            name = ours.replace("encoder.layers.", "encoder.layer.", 1) if ours.startswith(blocks) else of_dense[ours]
            tensors[_written_name(name)] = tensor
    write_directory(directory, content, {name: Pieces.of(tensor) for name, tensor in tensors.items()})
    BERT.write(directory)
    return architecture


def read_section(content: Mapping[str, Any]) -> tuple[BertShape, BertConfig]:
    """Return what a ``config.json`` of ours says of the encoder; the head above it does not matter here.

    Raises UserError for values that cannot be followed.
    """
    shape = BertShape.from_hugging_face({**content, "model_type": "bert"})
    with followed():
        return shape, BertClassifierConfig(**content[MIXTURE], dropout=content["hidden_dropout_prob"])


def _config_of(
    model: BertModel, labels: Sequence[str], dtype: torch.dtype | None, padding: int | None
) -> dict[str, Any]:
    """Return the content of ``config.json``; without ``labels`` they are LABEL_0, LABEL_1, ..."""
    content = model.shape.to_hugging_face() | {
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "architectures": [_class_of(model)],
        "pad_token_id": padding,
        **dtype_fields(dtype or model.encoder.embeddings.token.weight.dtype),
    }
    if isinstance(model, BertClassifier):
        named = dict(enumerate(labels or (f"LABEL_{i}" for i in range(model.num_labels))))
        if len(named) != model.num_labels:
            raise UserError(f"labels={list(labels)}: the model has {model.num_labels}; name each of them")
        content["id2label"] = {str(i): label for i, label in named.items()}
        content["label2id"] = {label: i for i, label in named.items()}
        content["problem_type"] = "regression" if model.num_labels == 1 else "single_label_classification"
    return content


def _class_of(model: BertModel) -> str:
    return "BertForSequenceClassification" if isinstance(model, BertClassifier) else "BertForQuestionAnswering"


def _written_name(name: str, prefixed: bool = True) -> str:
    return PREFIX + name if prefixed and not name.startswith(HEADS) else name
