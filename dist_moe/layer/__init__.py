"""The mixture-of-experts layer: gate -> slot map -> dispatch -> experts -> combine."""

from dist_moe.layer.batch_norm import BatchNormOverRanks
from dist_moe.layer.dense import DenseReplay
from dist_moe.layer.moe import MoE, MoEOutput, Replay

__all__ = ["BatchNormOverRanks", "DenseReplay", "MoE", "MoEOutput", "Replay"]
