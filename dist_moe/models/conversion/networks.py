"""One dense feed-forward network as several: experts that hold some of its hidden neurons each, or copies of it.

A network is a :class:`~dist_moe.kernels.FeedForwardWeights` with a stack of one: ``up`` (1, D, H), ``down`` (1, H, D'),
and what there is of ``gate``, ``up_bias`` (1, H) and ``down_bias`` (1, D'). All passes give new tensors.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.kernels import FeedForwardWeights

Mixture = Literal["sum", "mean"]
Order = Literal["importance", "random", "inverse"]


def take_neurons(dense: FeedForwardWeights, neurons_EW: Tensor) -> FeedForwardWeights:
    """Return experts, of which e has the hidden neurons ``neurons_EW[e]`` (int64, W each, in that order), and the
    output bias whole.

    With all neurons in one expert, in any order, that expert is the network. Raises ValueError for a neuron that
    there is not.
    """
    hidden = _num_neurons(dense)
    if neurons_EW.numel() and not 0 <= int(neurons_EW.min()) <= int(neurons_EW.max()) < hidden:
        raise ValueError(f"neurons must lie in 0..{hidden - 1}, got {int(neurons_EW.min())}..{int(neurons_EW.max())}")

    def columns(weight_1DH: Tensor) -> Tensor:
        return weight_1DH[0].T[neurons_EW].transpose(1, 2).contiguous()

    return FeedForwardWeights(
        up=columns(dense.up),
        down=dense.down[0][neurons_EW],
        gate=None if dense.gate is None else columns(dense.gate),
        up_bias=None if dense.up_bias is None else dense.up_bias[0][neurons_EW],
        down_bias=None if dense.down_bias is None else dense.down_bias.repeat(len(neurons_EW), 1),
    )


def split_exactly(dense: FeedForwardWeights, num_experts: int, mixture: Mixture = "mean") -> FeedForwardWeights:
    """Return (N, D, H / N) experts whose ``mixture`` over all N is the dense network.

    Zhang et al.: MoEfication (Findings of ACL 2022); Chen et al., SMoE-Dropout (ICLR 2023), which starts from such
    experts. A network is a sum over its neurons, so with b the output bias

        FFN(x) = sum_i E_i(x) + b = N mean_i E_i(x) + b,        E_i: the neurons i H/N .. (i + 1) H/N - 1

    "mean": for gates whose weights sum to 1; each expert gives N times its part, and the bias whole. "sum": each
    gives its part, and an N-th of the bias. Raises UserError if N does not divide H.
    """
    hidden = _num_neurons(dense)
    if hidden % num_experts:
        raise UserError(f"num_experts={num_experts} does not divide the feed-forward width {hidden}")
    experts = take_neurons(dense, torch.arange(hidden).view(num_experts, -1))
    if mixture == "mean":
        return experts._replace(down=experts.down * num_experts)
    bias = experts.down_bias
    return experts._replace(down_bias=None if bias is None else bias / num_experts)


def copies(dense: FeedForwardWeights, num_experts: int, noise: float = 0.0, seed: int = 0) -> FeedForwardWeights:
    """Return ``num_experts`` copies (Komatsuzaki et al.: Sparse Upcycling, ICLR 2023).

    Without noise, copies mixed with weights that sum to 1 are the dense network whatever the gate says; noise makes
    the experts differ before the gate has learnt anything. ``noise``: standard deviation of what is added to their
    matrices, of each copy its own, in units of the standard deviation of the matrix; biases have none. Equal for equal
    ``seed``, whatever torch's global generator has drawn before.
    """
    _num_neurons(dense)
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


def ranked(importance_H: Tensor, order: Order = "importance", seed: int = 0) -> Tensor:
    """Return (H,) int64 neurons, the first to be kept first; of equally important ones the lower.

    "random": a permutation drawn from ``seed``; "inverse": the least important first. Both are there to compare.
    """
    if order == "random":
        return torch.randperm(len(importance_H), generator=torch.Generator().manual_seed(seed))
    return importance_H.argsort(descending=order == "importance", stable=True)


def partition(ranked_H: Tensor, num_experts: int, width: int, shared: int) -> Tensor:
    """Return (E, width) int64: the neurons of each expert, of which the first ``shared`` are those of all.

    Zuo et al.: MoEBERT (NAACL 2022), section 3. With the neurons in order of falling importance, expert e of N gets
    the first s, and of those after them s + e, s + e + N, s + e + 2N, ... until it has as many as it is wide.
    Raises UserError if the neurons do not suffice, naming how many must be shared.
    """
    hidden = len(ranked_H)
    if not 0 <= shared <= width:
        raise UserError(f"shared={shared} neurons do not fit experts of {width}; allowed: 0..{width}")
    needed = shared + num_experts * (width - shared)
    if needed > hidden:
        least = -(-(num_experts * width - hidden) // max(num_experts - 1, 1))
        remedy = f"share at least {least}" if least <= width <= hidden else f"experts can be at most {hidden} wide"
        raise UserError(
            f"{num_experts} experts of {width} neurons, {shared} of them shared, take {needed} of {hidden}; {remedy}"
        )
    own_EW = torch.arange(shared, needed).view(-1, num_experts).T
    place_EW = torch.cat([torch.arange(shared).expand(num_experts, -1), own_EW], dim=1)
    return ranked_H[place_EW]


def _num_neurons(dense: FeedForwardWeights) -> int:
    """Return H. Raises ValueError unless ``dense`` is a single network."""
    if len(dense.up) != 1:
        raise ValueError(f"expected the weights of one dense network, got {len(dense.up)}")
    return dense.up.shape[2]
