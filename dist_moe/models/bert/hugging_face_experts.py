"""BERTs with experts as Hugging Face directories: an architecture of our own, which is BERT's but for its MoE layers.

    write_with_experts(model, config, directory)
    AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)

Tensors of dense parts have transformers' names, those of MoE layers ours: experts stacked by global id, gates, tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_moe.errors import UserError
from dist_moe.experts import FeedForwardBank
from dist_moe.models.bert.answerer import BertAnswererConfig
from dist_moe.models.bert.hugging_face import class_of, config_of, name_map, written_name
from dist_moe.models.bert.model import AUXILIARY, BertConfig, BertModel
from dist_moe.models.bert.shape import BertShape
from dist_moe.models.hugging_face.fields import CONTEXT, MIXTURE, followed
from dist_moe.models.hugging_face.files import tensors_of, write_directory
from dist_moe.models.hugging_face.remote_code import BERT

MODEL_TYPE = "dist_moe_bert"
_ELSEWHERE = {"name", "auxiliary_head", "hidden", "dropout"}
"""Fields of a model's section that BERT's own say, or that are for training alone."""


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
    name = f"DistMoE{class_of(model)}"
    content = config_of(model, labels, dtype, padding) | {
        "model_type": MODEL_TYPE,
        "architectures": [name],
        MIXTURE: _section(model, config),
        CONTEXT: {"total_steps": total_steps},
        **BERT.fields(imports),
    }
    tensors = tensors_of(model, dtype, {})
    write_directory(directory, content, {written_name(theirs): tensors[ours] for ours, theirs in _names(model).items()})
    BERT.write(directory)
    return name


def read_section(content: Mapping[str, Any]) -> tuple[BertShape, BertConfig]:
    """What a ``config.json`` of ours says. Raises UserError for values that cannot be followed."""
    shape = BertShape.from_hugging_face({**content, "model_type": "bert"})
    with followed():
        return shape, BertAnswererConfig(**content[MIXTURE], dropout=content["hidden_dropout_prob"])


def _section(model: BertModel, config: BertConfig) -> dict[str, Any]:
    """With the width of experts as it is: it may be a share of a width that the dense layers have no longer."""
    bank = next(iter(model.moe_layers.values())).experts
    assert isinstance(bank, FeedForwardBank)
    return config.model_dump(mode="json", exclude=_ELSEWHERE) | {"expert_hidden": bank.hidden}


def _names(model: BertModel) -> dict[str, str]:
    """Ours to theirs, of all that the model keeps."""
    of_dense, dense = name_map(model.shape.layers), model.dense_layers()
    blocks = tuple(f"encoder.layers.{i}.feed_forward." for i in range(model.shape.layers) if i not in dense)
    return {
        ours: ours.replace("encoder.layers.", "encoder.layer.", 1) if ours.startswith(blocks) else of_dense[ours]
        for ours in model.state_dict()
        if not ours.startswith(AUXILIARY)
    }
