"""BERT: an encoder of our own, dense or with experts, and its Hugging Face checkpoints."""

from dist_moe.models.bert.classifier import BertClassifier, BertClassifierConfig, BertOutput
from dist_moe.models.bert.hugging_face import BertCheckpoint, read_hugging_face, write_hugging_face
from dist_moe.models.bert.shape import BertShape

__all__ = [
    "BertCheckpoint",
    "BertClassifier",
    "BertClassifierConfig",
    "BertOutput",
    "BertShape",
    "read_hugging_face",
    "write_hugging_face",
]
