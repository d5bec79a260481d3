"""Experts: banks of stacked weights. Pure modules that hold one rank's share and know no ranks."""

from dist_moe.experts.bank import ExpertBank
from dist_moe.experts.bert_feed_forward import BertFeedForwardBank
from dist_moe.experts.conv import ConvBank
from dist_moe.experts.dense_relu import DenseReLUBank
from dist_moe.experts.feed_forward import FeedForwardBank

__all__ = ["BertFeedForwardBank", "ConvBank", "DenseReLUBank", "ExpertBank", "FeedForwardBank"]
