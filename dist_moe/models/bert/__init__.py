"""BERT: an encoder of our own, dense or with experts, and its Hugging Face checkpoints."""

from dist_moe.models.bert.answerer import BertAnswerer, BertAnswererConfig
from dist_moe.models.bert.classifier import BertClassifier, BertClassifierConfig
from dist_moe.models.bert.hugging_face import BertCheckpoint, read_hugging_face, read_shape, write_hugging_face
from dist_moe.models.bert.hugging_face_experts import write_with_experts
from dist_moe.models.bert.model import BertConfig, BertModel, BertOutput
from dist_moe.models.bert.shape import BertShape

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
