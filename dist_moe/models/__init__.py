"""Models: each a plain module that contains MoE layers."""

from dist_moe.models.bert import (
    BertAnswerer,
    BertAnswererConfig,
    BertClassifier,
    BertClassifierConfig,
    BertConfig,
    BertModel,
    BertOutput,
    BertShape,
)
from dist_moe.models.moe_model import ModelOutput, MoEModel, MoEModelConfig, RunShape
from dist_moe.models.recommender import Recommender, RecommenderConfig
from dist_moe.models.transformer import Transformer, TransformerConfig
from dist_moe.models.two_image_classifier import TwoImageClassifier, TwoImageClassifierConfig

__all__ = [
    "BertAnswerer",
    "BertAnswererConfig",
    "BertClassifier",
    "BertClassifierConfig",
    "BertConfig",
    "BertModel",
    "BertOutput",
    "BertShape",
    "MoEModel",
    "MoEModelConfig",
    "ModelOutput",
    "Recommender",
    "RecommenderConfig",
    "RunShape",
    "Transformer",
    "TransformerConfig",
    "TwoImageClassifier",
    "TwoImageClassifierConfig",
]
