"""COMET: k differentiable decision trees choose the experts.

Ibrahim, Chen, Hazimeh, Ponomareva, Zhao, Mazumder: COMET: Learning Cardinality Constrained Mixture
of Experts with Trees and Local Search (KDD 2023). For a token x, tree j, split node q and leaf i:

    h_q = S(w_q . x + b_q)                         probability of going left, S the smooth-step
    v_i = product over the ancestors of leaf i of h (left) or 1 - h (right)
    a_i = A_i . x + c_i                            leaf logit
    g_i = sum_j v_ij exp(a_ij) / sum_{i,j} v_ij exp(a_ij)

The tree is a heap: root 0, children of q are 2q+1 and 2q+2, n-1 splits, n leaves, any n >= 2.
A leaf that some ancestor excludes has v = 0 exactly, hence g = 0 exactly, with zero gradient to
everything that made it 0: its expert can be skipped forward and backward.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.gates.base import Gate
from dist_moe.gates.smooth_step import smooth_step
from dist_moe.routing import Route
from dist_moe.settings import Settings

ENTROPY_EPSILON = 1e-6
LEAF_INIT_RANGE = 0.05


class CometConfig(Settings):
    """The COMET gate: k trees whose splits harden while training, so that k experts remain."""

    name: Literal["comet"] = "comet"
    k: int = Field(2, ge=1, description="number of trees: the experts per token once the trees are hard")
    gamma: float = Field(1.0, gt=0, description="width of the smooth-step: the smaller, the sooner a split saturates")
    entropy_weight: float = Field(
        1.0, ge=0, description="lambda of the paper: the larger, the sooner every tree picks one leaf"
    )

    def build(self, dim: int, num_experts: int) -> Comet:
        return Comet(dim, num_experts, self.k, self.gamma, self.entropy_weight)


class Comet(Gate):
    """k trees over ``num_experts`` leaves each; all (tree, leaf) pairs share one softmax.

    Parameters: ``split_weight`` (k, n-1, dim), ``split_bias`` (k, n-1) in heap order;
    ``leaf_weight`` (k, n, dim), ``leaf_bias`` (k, n) from left to right. ``route.aux["entropy"]`` is
    ``entropy_weight`` times the mean over tokens of the trees' summed leaf entropies.
    """

    def __init__(self, dim: int, num_experts: int, k: int = 2, gamma: float = 1.0, entropy_weight: float = 1.0) -> None:
        super().__init__(dim, num_experts)
        if not 1 <= k <= num_experts:
            raise ValueError(f"k must lie in 1..num_experts={num_experts}, got {k}")
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.k = k
        self.gamma = gamma
        self.entropy_weight = entropy_weight
        self.split_weight = nn.Parameter(torch.empty(k, num_experts - 1, dim))
        self.split_bias = nn.Parameter(torch.empty(k, num_experts - 1))
        self.leaf_weight = nn.Parameter(torch.empty(k, num_experts, dim))
        self.leaf_bias = nn.Parameter(torch.empty(k, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's: splits U(-gamma/100, gamma/100), so that all leaves are equally likely."""
        for split in (self.split_weight, self.split_bias):
            nn.init.uniform_(split, -self.gamma / 100, self.gamma / 100)
        for leaf in (self.leaf_weight, self.leaf_bias):
            nn.init.uniform_(leaf, -LEAF_INIT_RANGE, LEAF_INIT_RANGE)

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Route:
        mass_TKE = self.leaf_mass(x_TD)
        logit_TKE = _affine(x_TD, self.leaf_weight, self.leaf_bias)
        weight_TE = _joint_softmax(logit_TKE, mass_TKE).sum(dim=1)
        return Route.from_dense(weight_TE, {"entropy": self.entropy_weight * mean_leaf_entropy(mass_TKE)})

    def leaf_mass(self, x_TD: Tensor) -> Tensor:
        """v, of shape (T, k, n): how much of each token reaches each leaf; sums to 1 over leaves."""
        left_TKQ, right_TKQ = smooth_step(_affine(x_TD, self.split_weight, self.split_bias), self.gamma)
        return leaf_mass_of_splits(left_TKQ, right_TKQ)


def leaf_mass_of_splits(left_TKQ: Tensor, right_TKQ: Tensor) -> Tensor:
    """Push a unit of mass down the heap: (T, k, n-1) split probabilities -> (T, k, n) leaf masses.

    Level by level; the nodes of a level, and their children, are contiguous in the heap. Leaves
    from left to right are those of the deepest level followed by those of the level above it.
    """
    num_splits = left_TKQ.shape[-1]
    num_nodes = 2 * num_splits + 1
    level = left_TKQ.new_ones(*left_TKQ.shape[:-1], 1)
    first, leaves_above = 0, level[..., :0]
    while first < num_splits:
        inner = min(first + level.shape[-1], num_splits) - first
        parents = level[..., :inner]
        leaves_above = level[..., inner:]
        nodes = slice(first, first + inner)
        children = torch.stack([parents * left_TKQ[..., nodes], parents * right_TKQ[..., nodes]], dim=-1)
        first = 2 * first + 1
        level = children.flatten(start_dim=-2)
    assert first + level.shape[-1] == num_nodes
    return torch.cat([level, leaves_above], dim=-1)


def mean_leaf_entropy(mass_TKE: Tensor) -> Tensor:
    """mean over tokens of sum over trees and leaves of -v log(v + 1e-6); 0 without tokens."""
    entropy_T = -(mass_TKE * (mass_TKE + ENTROPY_EPSILON).log()).sum(dim=(1, 2))
    return entropy_T.sum() / max(len(entropy_T), 1)


def _affine(x_TD: Tensor, weight_KQD: Tensor, bias_KQ: Tensor) -> Tensor:
    """(T, k, q) values of k * q hyperplanes, in the precision of ``x_TD``."""
    weight = weight_KQD.flatten(0, 1).to(x_TD.dtype)
    values = nn.functional.linear(x_TD, weight, bias_KQ.flatten().to(x_TD.dtype))
    return values.unflatten(-1, bias_KQ.shape)


def _joint_softmax(logit_TKE: Tensor, mass_TKE: Tensor) -> Tensor:
    """softmax over all (tree, leaf) pairs of a + log v, exactly 0 where v is exactly 0."""
    reachable = mass_TKE > 0
    log_mass = torch.where(reachable, mass_TKE, 1).log().masked_fill(~reachable, -torch.inf)
    return (logit_TKE + log_mass).flatten(1).softmax(dim=-1).view_as(logit_TKE)
