"""BERT: an encoder of our own, dense or with experts, and its Hugging Face checkpoints."""

from dist_moe.models.bert.encoder import BertShape
from dist_moe.models.bert.hugging_face import (
    BertCheckpoint,
    read_hugging_face,
    read_shape,
    write_hugging_face,
    write_with_experts,
)
from dist_moe.models.bert.model import (
    BertAnswerer,
    BertAnswererConfig,
    BertClassifier,
    BertClassifierConfig,
    BertConfig,
    BertModel,
    BertOutput,
)

__all__ = [
    "BertAnswerer",
    "BertAnswererConfig",
    "BertCheckpoint",
    "BertClassifier",
    "BertClassifierConfig",
    "BertConfig",
    "BertModel",
    "BertOutput",
    "BertShape",
    "read_hugging_face",
    "read_shape",
    "write_hugging_face",
    "write_with_experts",
]
