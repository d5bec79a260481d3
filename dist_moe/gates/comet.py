"""COMET: k differentiable decision trees choose the experts.

Ibrahim, Chen, Hazimeh, Ponomareva, Zhao, Mazumder: COMET: Learning Cardinality Constrained Mixture
of Experts with Trees and Local Search (KDD 2023). For a token x, tree j, split node q and leaf i:

    h_q = S(w_q . x + b_q)                         probability of going left, S the smooth-step
    v_i = product over the ancestors of leaf i of h (left) or 1 - h (right)
    a_i = A_i . x + c_i                            leaf logit
    g_i = sum_j v_ij exp(a_ij) / sum_{i,j} v_ij exp(a_ij)

A leaf that some ancestor excludes has v = 0 exactly, hence g = 0 exactly, with zero gradient to
everything that made it 0: its expert can be skipped forward and backward.

Slots that the gate may not choose are leaves that the trees do not have: a split of which one side leads to
such leaves only goes to the other side, whatever the token. So every tree's leaf masses still sum to 1, however
hard it is, and the entropy term draws no mass to where it would be lost, as it would if such leaves were
zeroed and the others divided by their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.gates.base import GATES, Gate, GateContext, GateSettings, Mixture, affine, check_k, smooth_step
from dist_moe.gates.lazy_tree import Visit, dense_rows, descend_lazily, roots_of
from dist_moe.gates.top_k import largest
from dist_moe.gates.tree import descend, one_sided_splits
from dist_moe.kernels import (
    DENSE_GAIN,
    Band,
    Pairs,
    dense_products,
    products_of_band,
    select,
    sparse_products,
    sums_at,
)
from dist_moe.routing import Route

ENTROPY_EPSILON = 1e-6
LEAF_INIT_RANGE = 0.05
# A batch that turns out to be dense has cost a fifth of its dense route by then: with fewer experts, more.
LAZY_FROM = 128


@GATES.register
class CometConfig(GateSettings):
    """The COMET gate: k trees whose splits harden while training, so that k experts remain."""

    evaluation_fields: ClassVar[tuple[str, ...]] = ("max_active", "hard_evaluation", "lazy")
    stackable: ClassVar[bool] = True
    varying: ClassVar[tuple[str, ...]] = ("gamma", "entropy_weight")

    name: Literal["comet"] = "comet"
    k: int = Field(2, ge=1, description="number of trees: the experts per token once the trees are hard")
    gamma: float = Field(1.0, gt=0, description="width of the smooth-step: the smaller, the sooner a split saturates")
    entropy_weight: float = Field(
        1.0, ge=0, description="lambda of the paper: the larger, the sooner every tree picks one leaf"
    )
    max_active: int | None = Field(
        None, ge=1, description="keep at most this many leaves per token, the heaviest, renormalised (null: all)"
    )
    hard_evaluation: bool = Field(
        False, description="evaluate with every split followed at 1/2, so that k is a bound, not a limit"
    )
    balance_weight: float = Field(
        0.0, ge=0, description="weight of the per-split balance penalty (the paper's experiments: 0)"
    )
    static: bool = Field(False, description="the same mixture for every token: splits and leaves see no input")
    lazy: bool | None = Field(
        None,
        description=f"visit only the reachable nodes: the same route, cheaper for large trees that have hardened "
        f"(null: from {LAZY_FROM} experts on, for every batch of which few nodes are reachable)",
    )

    @property
    def has_entropy(self) -> bool:
        """Whether the leaf entropies have a weight."""
        return self.entropy_weight > 0

    def experts_per_token(self, num_experts: int) -> int:
        """Return the bound of hard trees: a leaf of each."""
        return min(self.k, self.max_active or self.k, num_experts)

    def build(self, dim: int, num_experts: int, context: GateContext) -> Comet:
        """Return the gate with these options."""
        return Comet(dim, num_experts, **self.model_dump(exclude={"name"}))

    def validation_errors(self, num_experts: int) -> Iterator[str]:
        """Yield also whether lazy and static exclude each other."""
        yield from super().validation_errors(num_experts)
        if self.lazy and self.static:
            yield "lazy=true: a static tree (static=true) sees no tokens, by which it could be visited lazily"


class Comet(Gate):
    """k trees over ``num_experts`` leaves each; all (tree, leaf) pairs share one softmax.

    Parameters: ``split_weight`` (k, n-1, dim), ``split_bias`` (k, n-1) in heap order;
    ``leaf_weight`` (k, n, dim), ``leaf_bias`` (k, n) from left to right; a ``static`` gate has the
    biases only. The trees are the branches. ``aux["entropy"]`` is ``entropy_weight`` times the mean
    over tokens of the trees' summed leaf entropies; ``aux["split_balance"]``, if it has a weight,
    see :func:`split_balance`. The other options are described in :class:`CometConfig`.
    """

    can_exclude = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        gamma: float = 1.0,
        entropy_weight: float = 1.0,
        *,
        max_active: int | None = None,
        hard_evaluation: bool = False,
        balance_weight: float = 0.0,
        static: bool = False,
        lazy: bool | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        check_k(k, num_experts)
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        if max_active is not None and max_active < 1:
            raise ValueError(f"max_active must be at least 1, got {max_active}")
        if lazy and static:
            raise ValueError("a static tree has no tokens to visit it lazily: lazy=True does not go with static=True")
        self.k = self.num_branches = k
        self.gamma = gamma
        self.entropy_weight = entropy_weight
        self.max_active = max_active
        self.hard_evaluation = hard_evaluation
        self.balance_weight = balance_weight
        self.static = static
        self.lazy = lazy
        self.split_bias = nn.Parameter(torch.empty(k, num_experts - 1))
        self.leaf_bias = nn.Parameter(torch.empty(k, num_experts))
        self.split_weight = None if static else nn.Parameter(torch.empty(k, num_experts - 1, dim))
        self.leaf_weight = None if static else nn.Parameter(torch.empty(k, num_experts, dim))
        # As the paper's: splits are U(-gamma/100, gamma/100), so that all leaves are equally likely.
        for name, parameter in self.named_parameters():
            bound = self.gamma / 100 if name.startswith("split") else LEAF_INIT_RANGE
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def largest_entropy(self) -> float:
        """The weighted entropy of trees whose leaves all have the same mass."""
        return self.entropy_weight * self.k * math.log(self.num_allowed)

    def mixture(self, x_TD: Tensor, ids_T: Tensor | None = None) -> Mixture:
        """Return the trees' shares of the softmax, each leaf's mass times its exponential; every node is computed."""
        left_TKQ, right_TKQ = self._split(self._turn(affine(x_TD, self.split_weight, self.split_bias)))
        split_mass_TKQ, mass_TKE = descend(left_TKQ, right_TKQ)
        weight_TKE = _joint_softmax(affine(x_TD, self.leaf_weight, self.leaf_bias), mass_TKE)
        if self.max_active is not None:
            weight_TKE = self._cap(weight_TKE, self.max_active)

        def reached() -> Tensor:
            return torch.stack([(split_mass_TKQ * left_TKQ).sum(0), split_mass_TKQ.sum(0)])

        return Mixture(weight_TKE, self._aux(leaf_entropy(mass_TKE), reached, len(x_TD)))

    def route(self, x_TD: Tensor, ids_T: Tensor | None) -> Route:
        """Return the route, from a lazy visit of the reachable nodes where that is asked for, or cheaper."""
        lazy = not self.static and self.num_experts >= LAZY_FROM if self.lazy is None else self.lazy
        visit = self._visit(x_TD) if lazy else None
        return super().route(x_TD, ids_T) if visit is None else self._route_of(x_TD, visit)

    def _turn(self, t: Tensor, node_N: Tensor | None = None) -> Tensor:
        """Saturate the values (..., n-1), or (N,) of the splits ``node_N``, of splits that must go to one side."""
        if self.allowed_E is None:
            return t
        must = one_sided_splits(self.allowed_E)
        left, right = must if node_N is None else (mask_Q[node_N] for mask_Q in must)
        return torch.where(left, self.gamma, torch.where(right, -self.gamma, t))

    def _split(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.hard_evaluation and not self.training:
            left = torch.where(t.isnan(), t, (t >= 0).to(t.dtype))
            return left, 1 - left
        return smooth_step(t, self.gamma)

    def _cap(self, weight_TKE: Tensor, limit: int) -> Tensor:
        """Zero all but the heaviest slots and divide by what is left."""
        slots_TS = weight_TKE.flatten(1) if self.splits_branches else weight_TKE.sum(1)
        kept_TM = largest(slots_TS.detach(), limit)
        kept_TS = torch.zeros_like(slots_TS, dtype=torch.bool).scatter(1, kept_TM, True)
        kept_TKE = kept_TS.view_as(weight_TKE) if self.splits_branches else kept_TS.unsqueeze(1)
        weight_TKE = torch.where(kept_TKE, weight_TKE, 0)
        return weight_TKE / weight_TKE.sum(dim=(1, 2), keepdim=True)

    def _visit(self, x_TD: Tensor) -> Visit | None:
        """Return the reached nodes; None if so many are that the dense route is cheaper, and the choice is ours."""
        assert self.split_weight is not None  # a static gate is never lazy
        weight_KQD, bias_KQ = self.split_weight.detach().to(x_TD.dtype), self.split_bias.detach().to(x_TD.dtype)
        num_first = dense_rows(self.num_experts - 1)
        first_KTB = dense_products(x_TD.detach(), weight_KQD, bias_KQ, 0, num_first)

        def products(pairs: Pairs, band: Band) -> Tensor:
            if band.last <= num_first:
                t_N = select(first_KTB, pairs, 0)
            else:
                t_N = products_of_band(x_TD, weight_KQD, bias_KQ, pairs, band)
            return self._turn(t_N, pairs.row_N)

        roots, gain = roots_of(len(x_TD), self.k, x_TD), DENSE_GAIN if self.lazy is None else 0
        return descend_lazily(roots, self.num_experts, products, self._split, gain)

    def _route_of(self, x_TD: Tensor, visit: Visit) -> Route:
        leaves = visit.leaves
        left_F, right_F = self._split(self._sparse_affine(x_TD, "split", *visit.fractional()))
        split_mass_N, leaf_mass_N = visit.masses(left_F, right_F)
        band = Band(len(leaves), 0, self.num_experts)
        logit_N = self._sparse_affine(x_TD, "leaf", leaves.pairs, None, [band]) + leaf_mass_N.log()
        weight_N = _segment_softmax(logit_N, leaves.token_N, len(x_TD))
        slot_N = leaves.node_N + (leaves.tree_N * self.num_experts if self.splits_branches else 0)
        aux = self._aux(leaf_entropy(leaf_mass_N), lambda: self._reached(visit, split_mass_N, left_F), len(x_TD))
        route = Route.merge(leaves.token_N, slot_N, weight_N, len(x_TD), self.num_slots, aux)
        route = route.keep(route.weight_N != 0)  # exp() of a far smaller logit is 0, as in the dense mixture
        return route if self.max_active is None else route.heaviest(self.max_active)

    def _sparse_affine(
        self, x_TD: Tensor, part: str, pairs: Pairs, known_N: Tensor | None, bands: list[Band]
    ) -> Tensor:
        weight_KQD, bias_KQ = (getattr(self, f"{part}_{kind}").to(x_TD.dtype) for kind in ("weight", "bias"))
        return sparse_products(x_TD, weight_KQD, bias_KQ, pairs, bands, known_N)

    def _reached(self, visit: Visit, mass_N: Tensor, left_F: Tensor) -> Tensor:
        """(2, k, n-1): the mass that goes left at each split, and the mass that reaches it."""
        parts = left_F.split([len(level.fractional_F) for level in visit.levels])
        levels = zip(visit.levels, parts, strict=True)
        left_N = torch.cat([level.left_N.index_copy(0, level.fractional_F, part_F) for level, part_F in levels])
        place_N = visit.splits.tree_N * (self.num_experts - 1) + visit.splits.node_N
        reached_Q2 = sums_at(torch.stack([mass_N * left_N, mass_N], dim=1), place_N, self.split_bias.numel())
        return reached_Q2.t().view(2, *self.split_bias.shape)

    def _aux(self, entropy: Tensor, reached: Callable[[], Tensor], num_tokens: int) -> dict[str, Tensor]:
        aux = {"entropy": self.entropy_weight * (entropy / max(num_tokens, 1))}
        if self.balance_weight and self.training:
            reached_2KQ, _ = self.total(reached(), num_tokens)
            aux["split_balance"] = self.balance_weight * split_balance(reached_2KQ, self.allowed_E)
        return aux


def leaf_entropy(mass: Tensor) -> Tensor:
    """Return the sum of -v log(v + 1e-6) over all given leaf masses; leaves of mass 0 add nothing."""
    return -(mass * (mass + ENTROPY_EPSILON).log()).sum()


def split_balance(reached_2KQ: Tensor, allowed_E: Tensor | None = None) -> Tensor:
    """Return a penalty that is least when half of what reaches a split goes left, as in the authors' history.

    With alpha the share of the mass reaching a split that goes left, over all tokens:
    mean over trees of the sum over splits of -(log(alpha + 1e-6) + log(1 - alpha + 1e-6)) / 2.
    Splits that must go to one side, because of the leaves that are allowed, do not count.
    """
    left_KQ, mass_KQ = reached_2KQ
    alpha_KQ = left_KQ / (mass_KQ + ENTROPY_EPSILON)
    penalty_KQ = -0.5 * ((alpha_KQ + ENTROPY_EPSILON).log() + (1 - alpha_KQ + ENTROPY_EPSILON).log())
    if allowed_E is not None:
        left_Q, right_Q = one_sided_splits(allowed_E)
        penalty_KQ = penalty_KQ.masked_fill(left_Q | right_Q, 0)
    return penalty_KQ.sum(dim=1).mean()


def _joint_softmax(logit_TKE: Tensor, mass_TKE: Tensor) -> Tensor:
    """softmax over all (tree, leaf) pairs of a + log v, exactly 0 where v is exactly 0."""
    reachable = mass_TKE != 0
    log_mass = torch.where(reachable, mass_TKE, 1).log().masked_fill(~reachable, -torch.inf)
    return (logit_TKE + log_mass).flatten(1).softmax(dim=-1).view_as(logit_TKE)


def _segment_softmax(logit_N: Tensor, token_N: Tensor, num_tokens: int) -> Tensor:
    """softmax over the entries of each token."""
    lowest_T = logit_N.new_full((num_tokens,), -torch.inf)
    largest_T = lowest_T.scatter_reduce(0, token_N, logit_N.detach(), "amax")
    exp_N = (logit_N - largest_T[token_N]).exp()
    return exp_N / sums_at(exp_N, token_N, num_tokens)[token_N]
