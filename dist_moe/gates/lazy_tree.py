"""The descent of trees that visits only nodes with mass, and its backward, which skips saturated splits.

A saturated split hands all of its mass to one child and has no gradient: it is a step along a path.
So masses change, and gradients are due, at *fractional* splits only, which both children leave with
mass. The descent computes numbers alone; :meth:`Visit.masses` then ties them to the probabilities of
the fractional splits by one autograd function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_moe.gates.tree import places_of_leaves
from dist_moe.kernels import Band, Pairs

# One product with the 2^5 first rows costs what five levels cost with one reached node each (D = 512), or half (64).
DENSE_LEVELS = 5


def dense_rows(num_splits: int) -> int:
    """Return the number of rows of the first dense product: these levels' and one more, a width that kernels like."""
    return min(1 << DENSE_LEVELS, num_splits)


@dataclass(frozen=True)
class Nodes:
    """N visited nodes: of which token and tree, which heap index, and the mass that reaches it."""

    token_N: Tensor
    tree_N: Tensor
    node_N: Tensor
    mass_N: Tensor

    def __len__(self) -> int:
        return len(self.node_N)

    def at(self, place_M: Tensor) -> Nodes:
        """Return the nodes at the indices ``place_M``."""
        return Nodes(*(x.index_select(0, place_M) for x in (self.token_N, self.tree_N, self.node_N, self.mass_N)))

    @property
    def pairs(self) -> Pairs:
        """The nodes as pairs of a token and a row of a tree's matrix."""
        return Pairs(self.token_N, self.tree_N, self.node_N)


Products = Callable[[Pairs, Band], Tensor]
Split = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Level:
    """The visited splits of one level and what became of their mass.

    ``t_N``, ``left_N``, ``right_N``: their products and probabilities. ``fractional_F``: the places of
    those with two children of positive probability. The children are one of each split, in order (the
    left one of a fractional split), then the right ones of the fractional; ``kept_M``: those whose mass
    has not underflowed, None for all. ``inner_N``, ``above_A``, ``above``: on a level where some nodes
    are leaves already, the places of splits and leaves, and these leaves; else None.
    """

    splits: Nodes
    t_N: Tensor
    left_N: Tensor
    right_N: Tensor
    fractional_F: Tensor
    kept_M: Tensor | None
    band: Band
    inner_N: Tensor | None
    above_A: Tensor | None
    above: Nodes | None


@dataclass(frozen=True)
class Visit:
    """The result of a lazy descent: its ``levels``, and the ``leaves``, whose ``node_N`` is their place from left
    to right; the last ``num_deepest`` of them lie on the deepest level."""

    levels: list[Level]
    leaves: Nodes
    num_deepest: int

    @property
    def splits(self) -> Nodes:
        """All visited splits, level by level."""
        return concatenate([level.splits for level in self.levels])

    def fractional(self) -> tuple[Pairs, Tensor, list[Band]]:
        """Return the fractional splits, their products, and their bands: the first dense levels as one, then each."""
        nodes = [level.splits.at(level.fractional_F) for level in self.levels]
        t_F = torch.cat([level.t_N.index_select(0, level.fractional_F) for level in self.levels])
        top = self.levels[:DENSE_LEVELS]
        bands = [Band(sum(len(level.fractional_F) for level in top), 0, dense_rows(self.levels[-1].band.last))]
        below = self.levels[DENSE_LEVELS:]
        bands += [Band(len(level.fractional_F), level.band.first, level.band.last) for level in below]
        return concatenate(nodes).pairs, t_F, bands

    def masses(self, left_F: Tensor, right_F: Tensor) -> tuple[Tensor, Tensor]:
        """Return the masses of all splits and of the leaves, as functions of the fractional splits' probabilities."""
        return _Masses.apply(left_F, right_F, self)


def descend_lazily(roots: Nodes, num_leaves: int, products: Products, split: Split, gain: int = 0) -> Visit | None:
    """Return what following every branch of positive mass, a level at a time, finds: O(reached leaves * depth) nodes.

    ``products(pairs, band)``: (N,) values of the hyperplanes of these splits at these tokens, all of one
    level, the band. ``split(t_N)``: the probabilities of going left and right. ``gain``: None is returned
    as soon as a level below the first ``DENSE_LEVELS`` has more than one in ``gain`` of its nodes
    reached, for then the dense descent is cheaper (0: never).
    """
    with torch.no_grad():
        nodes, levels = roots, []
        for depth in range((num_leaves - 1).bit_length()):
            if depth >= DENSE_LEVELS and len(nodes) * gain > len(roots) << depth:
                return None
            level, nodes = _step(nodes, depth, num_leaves - 1, products, split)
            levels.append(level)
        above = [level.above for level in levels if level.above is not None]
        found = concatenate([*above, nodes])
        place_N = places_of_leaves(found.node_N, num_leaves)
    return Visit(levels, Nodes(found.token_N, found.tree_N, place_N, found.mass_N), len(nodes))


def roots_of(num_tokens: int, num_trees: int, like: Tensor) -> Nodes:
    """Return the root of every tree for every token, of mass 1 in the dtype and on the device of ``like``."""
    token_N = torch.arange(num_tokens, device=like.device).repeat_interleave(num_trees)
    tree_N = torch.arange(num_trees, device=like.device).repeat(num_tokens)
    return Nodes(token_N, tree_N, torch.zeros_like(token_N), like.new_ones(len(token_N)))


def concatenate(parts: Sequence[Nodes]) -> Nodes:
    """Return the nodes of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    names = ("token_N", "tree_N", "node_N", "mass_N")
    return Nodes(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _step(nodes: Nodes, depth: int, num_splits: int, products: Products, split: Split) -> tuple[Level, Nodes]:
    """Return one level, and the nodes that it leaves with mass."""
    band = Band(len(nodes), (1 << depth) - 1, min((2 << depth) - 1, num_splits))
    inner_N, above_N, above = None, None, None
    if (2 << depth) - 1 > num_splits:
        is_split_N = nodes.node_N < num_splits
        inner_N, above_N = is_split_N.nonzero().squeeze(1), (~is_split_N).nonzero().squeeze(1)
        above, nodes = nodes.at(above_N), nodes.at(inner_N)
        band = Band(len(nodes), band.first, band.last)
    t_N = products(nodes.pairs, band)
    left_N, right_N = split(t_N)
    fractional_F = ((left_N != 0) & (right_N != 0)).nonzero().squeeze(1)
    children, kept_M = _children(nodes, left_N, right_N, fractional_F)
    return Level(nodes, t_N, left_N, right_N, fractional_F, kept_M, band, inner_N, above_N, above), children


def _children(nodes: Nodes, left_N: Tensor, right_N: Tensor, fractional_F: Tensor) -> tuple[Nodes, Tensor | None]:
    first = Nodes(nodes.token_N, nodes.tree_N, 2 * nodes.node_N + 1 + (left_N == 0), nodes.mass_N)
    if not len(fractional_F):
        return first, None
    parents = nodes.at(fractional_F)
    mass_N = nodes.mass_N.index_copy(0, fractional_F, parents.mass_N * left_N.index_select(0, fractional_F))
    second = Nodes(
        parents.token_N, parents.tree_N, 2 * parents.node_N + 2, parents.mass_N * right_N.index_select(0, fractional_F)
    )
    children = concatenate([Nodes(first.token_N, first.tree_N, first.node_N, mass_N), second])
    alive_M = children.mass_N != 0
    if alive_M.all():
        return children, None
    kept_M = alive_M.nonzero().squeeze(1)
    return children.at(kept_M), kept_M


class _Masses(torch.autograd.Function):
    """Masses of all visited splits and of the leaves, as a function of the probabilities of the fractional splits."""

    @staticmethod
    def forward(ctx: Any, left_F: Tensor, right_F: Tensor, visit: Visit) -> tuple[Tensor, Tensor]:
        """Return the masses that the descent found."""
        ctx.save_for_backward(left_F, right_F)
        ctx.visit = visit
        ctx.set_materialize_grads(False)
        return visit.splits.mass_N.clone(), visit.leaves.mass_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_split_N: Tensor | None, grad_leaf_N: Tensor | None) -> tuple[Tensor, Tensor, None]:
        """Return the gradients to the probabilities, level by level from the leaves up."""
        left_F, right_F = ctx.saved_tensors
        visit: Visit = ctx.visit
        if grad_leaf_N is None:
            grad_leaf_N = left_F.new_zeros(len(visit.leaves))
        num_above = len(grad_leaf_N) - visit.num_deepest
        grad_above_A, grad_N = grad_leaf_N[:num_above], grad_leaf_N[num_above:]
        sizes = [len(level.fractional_F) for level in visit.levels]
        parts = list(zip(visit.levels, left_F.split(sizes), right_F.split(sizes), strict=True))
        grads, end = [], len(visit.splits)
        for level, *shares in reversed(parts):
            grad_N, grads_F = _to_parents(level, grad_N, *shares)
            grads.append(grads_F)
            if grad_split_N is not None:
                grad_N = grad_N + grad_split_N[end - len(level.splits) : end]
            end -= len(level.splits)
            if level.inner_N is not None and level.above_A is not None:
                joined_N = grad_N.new_empty(len(level.inner_N) + len(level.above_A))
                grad_N = joined_N.index_copy_(0, level.inner_N, grad_N).index_copy_(0, level.above_A, grad_above_A)
        grad_left_F, grad_right_F = (torch.cat(grads_F) for grads_F in zip(*reversed(grads), strict=True))
        return grad_left_F, grad_right_F, None


def _to_parents(level: Level, grad_M: Tensor, left_F: Tensor, right_F: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the gradients to a level's masses and to its probabilities, given those to its children's masses."""
    if level.kept_M is not None:
        grad_M = grad_M.new_zeros(len(level.splits) + len(left_F)).index_copy(0, level.kept_M, grad_M)
    first_N, second_F = grad_M.split([len(level.splits), len(left_F)])
    if not len(left_F):
        return first_N, (left_F, right_F)
    first_F, mass_F = (x_N.index_select(0, level.fractional_F) for x_N in (first_N, level.splits.mass_N))
    grad_N = first_N.index_copy(0, level.fractional_F, first_F * left_F + second_F * right_F)
    return grad_N, (first_F * mass_F, second_F * mass_F)
