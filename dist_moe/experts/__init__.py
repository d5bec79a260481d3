"""Experts: banks of stacked weights. Pure modules that hold one rank's share and know no ranks."""

from dist_moe.experts.bank import ExpertBank, ExpertSettings, InitStds
from dist_moe.experts.bert_feed_forward import BertFeedForwardBank
from dist_moe.experts.conv import ConvBank, ConvConfig
from dist_moe.experts.dense_relu import DenseReLUBank, DenseReLUConfig
from dist_moe.experts.feed_forward import FeedForwardBank, FeedForwardConfig
from dist_moe.experts.low_rank import LowRankConfig
from dist_moe.experts.mlp import FeatureGateConfig, MlpBank, MlpConfig
from dist_moe.experts.registry import EXPERTS

__all__ = [
    "EXPERTS",
    "BertFeedForwardBank",
    "ConvBank",
    "ConvConfig",
    "DenseReLUBank",
    "DenseReLUConfig",
    "ExpertBank",
    "ExpertSettings",
    "FeatureGateConfig",
    "FeedForwardBank",
    "FeedForwardConfig",
    "InitStds",
    "LowRankConfig",
    "MlpBank",
    "MlpConfig",
]
