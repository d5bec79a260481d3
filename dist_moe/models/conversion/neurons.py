"""One dense feed-forward network as experts that hold some of its hidden neurons each.

A network is a :class:`~dist_moe.kernels.FeedForwardWeights` with a stack of one: ``up`` (1, D, H), ``down`` (1, H, D'),
and what there is of ``gate``, ``up_bias`` (1, H) and ``down_bias`` (1, D'). All passes give new tensors.
"""

from __future__ import annotations

from torch import Tensor

from dist_moe.kernels import FeedForwardWeights


def num_neurons(dense: FeedForwardWeights) -> int:
    """H. Raises ValueError unless ``dense`` is a single network."""
    if len(dense.up) != 1:
        raise ValueError(f"expected the weights of one dense network, got {len(dense.up)}")
    return dense.up.shape[2]


def take_neurons(dense: FeedForwardWeights, neurons_EW: Tensor) -> FeedForwardWeights:
    """Expert e gets the hidden neurons ``neurons_EW[e]`` (int64, W each, in that order), and the output bias whole.

    With all neurons in one expert, in any order, that expert is the network. Raises ValueError for a neuron that
    there is not.
    """
    hidden = num_neurons(dense)
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
