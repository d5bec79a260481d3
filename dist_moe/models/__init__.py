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
from dist_moe.models.graphs import NodeClassifier, NodeClassifierConfig, WeakStrongConfig, WeakStrongNodes
from dist_moe.models.moe_model import (
    MODELS,
    ModelConfig,
    ModelOutput,
    MoEModel,
    MoEModelConfig,
    RunShape,
    models_of_kind,
)
from dist_moe.models.multi_task import (
    HomeConfig,
    LevelsModel,
    MMoE,
    MMoEConfig,
    PLEConfig,
    SharedBottom,
    SharedBottomConfig,
    TableFeatures,
)
from dist_moe.models.recommender import Recommender, RecommenderConfig
from dist_moe.models.transformer import Transformer, TransformerConfig
from dist_moe.models.two_image_classifier import TwoImageClassifier, TwoImageClassifierConfig

for _settings in (
    RecommenderConfig,
    TwoImageClassifierConfig,
    TransformerConfig,
    BertClassifierConfig,
    BertAnswererConfig,
    MMoEConfig,
    SharedBottomConfig,
    PLEConfig,
    HomeConfig,
    NodeClassifierConfig,
    WeakStrongConfig,
):
    MODELS.register(_settings)

__all__ = [
    "MODELS",
    "BertAnswerer",
    "BertAnswererConfig",
    "BertClassifier",
    "BertClassifierConfig",
    "BertConfig",
    "BertModel",
    "BertOutput",
    "BertShape",
    "HomeConfig",
    "LevelsModel",
    "MMoE",
    "MMoEConfig",
    "MoEModel",
    "MoEModelConfig",
    "ModelConfig",
    "ModelOutput",
    "NodeClassifier",
    "NodeClassifierConfig",
    "PLEConfig",
    "Recommender",
    "RecommenderConfig",
    "RunShape",
    "SharedBottom",
    "SharedBottomConfig",
    "TableFeatures",
    "Transformer",
    "TransformerConfig",
    "TwoImageClassifier",
    "TwoImageClassifierConfig",
    "WeakStrongConfig",
    "WeakStrongNodes",
    "models_of_kind",
]
