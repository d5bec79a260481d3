"""The mixture-of-experts layer: gate -> permutation -> dispatch -> experts -> combine."""

from dist_moe.layer.moe import MoE, MoEOutput

__all__ = ["MoE", "MoEOutput"]
