"""A feed-forward network of H neurons as N experts of H / N: together they are the network, exactly.

Zhang, Lin, Liu, Li, Sun, Zhou: MoEfication (Findings of ACL 2022); Chen et al., SMoE-Dropout (ICLR 2023), which starts
from such experts. A network is a sum over its neurons, so with b the output bias

    FFN(x) = sum_i E_i(x) + b = N mean_i E_i(x) + b,        E_i: the neurons i H/N .. (i + 1) H/N - 1
"""

from __future__ import annotations

from typing import Literal

import torch

from dist_moe.errors import UserError
from dist_moe.kernels import FeedForwardWeights
from dist_moe.models.conversion.neurons import num_neurons, take_neurons

Mixture = Literal["sum", "mean"]


def split_exactly(dense: FeedForwardWeights, num_experts: int, mixture: Mixture = "mean") -> FeedForwardWeights:
    """(N, D, H / N) experts whose ``mixture`` over all N is the dense network.

    "mean": for gates whose weights sum to 1; each expert gives N times its part, and the bias whole. "sum": each
    gives its part, and an N-th of the bias. Raises UserError if N does not divide H.
    """
    hidden = num_neurons(dense)
    if hidden % num_experts:
        raise UserError(f"num_experts={num_experts} does not divide the feed-forward width {hidden}")
    experts = take_neurons(dense, torch.arange(hidden).view(num_experts, -1))
    if mixture == "mean":
        return experts._replace(down=experts.down * num_experts)
    bias = experts.down_bias
    return experts._replace(down_bias=None if bias is None else bias / num_experts)
