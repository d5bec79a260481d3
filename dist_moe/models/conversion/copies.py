"""Sparse up-cycling: every expert is a copy of the dense network, with noise if wanted.

Komatsuzaki et al.: Sparse Upcycling (ICLR 2023). Without noise, copies mixed with weights that sum to 1 are the dense
network whatever the gate says; noise makes the experts differ before the gate has learnt anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.kernels import FeedForwardWeights
from dist_moe.models.conversion.neurons import num_neurons


def copies(dense: FeedForwardWeights, num_experts: int, noise: float = 0.0, seed: int = 0) -> FeedForwardWeights:
    """``num_experts`` copies; ``noise``: standard deviation of what is added to their matrices, of each copy its own,
    in units of the standard deviation of the matrix. Biases are copied as they are.

    The same for the same ``seed``, whatever torch's global generator has drawn before.
    """
    num_neurons(dense)
    generator = torch.Generator().manual_seed(seed)

    def noisy(weight_1DF: Tensor) -> Tensor:
        repeated = weight_1DF.repeat(num_experts, 1, 1)
        if not noise:
            return repeated
        drawn = torch.randn(repeated.shape, generator=generator, dtype=torch.float64)
        return repeated + (noise * weight_1DF.double().std().cpu() * drawn).to(repeated)

    return FeedForwardWeights(
        up=noisy(dense.up),
        down=noisy(dense.down),
        gate=None if dense.gate is None else noisy(dense.gate),
        up_bias=None if dense.up_bias is None else dense.up_bias.repeat(num_experts, 1),
        down_bias=None if dense.down_bias is None else dense.down_bias.repeat(num_experts, 1),
    )
