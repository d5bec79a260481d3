"""Few of the products of tokens with stacked rows: x_t . w_q + b_q for given (token, row) pairs.

Gathering a row of width D per pair and letting autograd differentiate it copies N x D numbers
several times and fills a gradient of the whole stack by scattered additions. Here pairs are read in
place, by the operators of an embedding bag: a product is the gradient of a bag's weight, the gradient
of a token is a bag of rows, the gradient of a row is a bag of tokens. Where pairs are dense among the
rows of their band, one matrix product over the band is cheaper, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dist_moe.kernels.token_rows import sums_at

# Inside a wide matrix product a product costs an 8th to an 18th of one alone: D = 64 and 512, on a core.
DENSE_GAIN = 12


@dataclass(frozen=True)
class Pairs:
    """N (token, row) pairs, no pair twice: ``token_N``, ``stack_N``, ``row_N`` int64."""

    token_N: Tensor
    stack_N: Tensor
    row_N: Tensor

    def __len__(self) -> int:
        return len(self.token_N)

    def __getitem__(self, place: slice | Tensor) -> Pairs:
        return Pairs(self.token_N[place], self.stack_N[place], self.row_N[place])


@dataclass(frozen=True)
class Band:
    """The next ``count`` pairs have rows in ``first`` <= row < ``last``, in every stack."""

    count: int
    first: int
    last: int


def sparse_products(
    x_TD: Tensor,
    weight_KQD: Tensor,
    bias_KQ: Tensor,
    pairs: Pairs,
    bands: Sequence[Band],
    known_N: Tensor | None = None,
) -> Tensor:
    """Return (N,) ``x_TD[token] . weight_KQD[stack, row] + bias_KQ[stack, row]`` for each of ``pairs``.

    ``bands`` cover the pairs in order; ``weight_KQD`` is contiguous and of the precision of ``x_TD``.
    ``known_N``: the products, if they have been computed already (see :func:`products_of_band`); they
    are then returned as they are, and differentiated. A row without pairs gets a zero gradient.
    """
    if sum(band.count for band in bands) != len(pairs):
        raise ValueError(f"{len(pairs)} pairs do not fit the bands {bands}")
    return _SparseProducts.apply(x_TD.contiguous(), weight_KQD, bias_KQ, pairs, bands, known_N)


def sparse_products_reference(x_TD: Tensor, weight_KQD: Tensor, bias_KQ: Tensor, pairs: Pairs) -> Tensor:
    """Compute :func:`sparse_products` of gathered rows, by tensor operations that autograd differentiates by itself."""
    place = (pairs.stack_N, pairs.row_N)
    return (x_TD[pairs.token_N] * weight_KQD[place]).sum(-1) + bias_KQ[place]


def products_of_band(x_TD: Tensor, weight_KQD: Tensor, bias_KQ: Tensor, pairs: Pairs, band: Band) -> Tensor:
    """Return (N,) products of the pairs of one band, without a gradient."""
    with torch.no_grad():
        if _dense_is_cheaper(x_TD, weight_KQD, band):
            product_KTB = dense_products(x_TD, weight_KQD, bias_KQ, band.first, band.last)
            return select(product_KTB, pairs, band.first)
        # x[token] . row is what the backward of an embedding bag calls the gradient of a sample's weight.
        row_N, token_N = pairs.stack_N * weight_KQD.shape[1] + pairs.row_N, pairs.token_N.contiguous()
        product_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x_TD, weight_KQD.flatten(0, 1), row_N, token_N[:1], token_N, 0
        )
        return product_N + bias_KQ.flatten().index_select(0, row_N)


def dense_products(x_TD: Tensor, weight_KQD: Tensor, bias_KQ: Tensor, first: int, last: int) -> Tensor:
    """Return (K, T, last - first): all products with the rows from ``first`` to ``last`` of every stack."""
    product_KTB = x_TD.new_empty(len(weight_KQD), len(x_TD), last - first)
    for weight_QD, bias_Q, product_TB in zip(weight_KQD, bias_KQ, product_KTB, strict=True):
        torch.addmm(bias_Q[first:last], x_TD, weight_QD[first:last].t(), out=product_TB)
    return product_KTB


def select(product_KTB: Tensor, pairs: Pairs, first: int) -> Tensor:
    """Return (N,) those of ``pairs`` among all products with the rows from ``first`` on."""
    return product_KTB.flatten().index_select(0, _flat_places(product_KTB, pairs, first))


def zeros_untouched(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return zeros of the dtype and device of ``like``; on a CPU, fresh pages are not written before their use.

    A gradient of the whole stack of which few rows are not 0 then costs what it holds: ``torch.zeros``
    writes every page, and has it faulted in first.
    """
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    return torch.from_numpy(np.zeros(tuple(shape), dtype)).to(like.dtype)


class _SparseProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_KQD: Tensor,
        bias_KQ: Tensor,
        pairs: Pairs,
        bands: Sequence[Band],
        known_N: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weight_KQD, bias_KQ, pairs.token_N, pairs.stack_N, pairs.row_N)
        ctx.bands = bands
        if known_N is not None:
            return known_N.clone()
        counts = [band.count for band in bands]
        parts = zip(*(x.split(counts) for x in (pairs.token_N, pairs.stack_N, pairs.row_N)), bands, strict=True)
        return torch.cat([products_of_band(x_TD, weight_KQD, bias_KQ, Pairs(*part), band) for *part, band in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x_TD, weight_KQD, bias_KQ, *pairs_N = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = torch.zeros_like(x_TD) if needs_x and not len(x_TD) else None  # None: nothing has come yet
        grad_weight = zeros_untouched(weight_KQD.shape, weight_KQD) if needs_weight else None
        grad_bias = torch.zeros_like(bias_KQ) if needs_bias else None
        start, scattered = 0, []
        for band in ctx.bands:
            place = slice(start, start + band.count)
            start += band.count
            if not band.count:
                continue
            if not _dense_is_cheaper(x_TD, weight_KQD, band):
                scattered.append(place)
                continue
            # By matrix products over the rows of the band.
            grad_KTB = x_TD.new_zeros(len(weight_KQD), len(x_TD), band.last - band.first)
            places_N = _flat_places(grad_KTB, Pairs(*(x[place] for x in pairs_N)), band.first)
            grad_KTB.view(-1).index_copy_(0, places_N, grad_N[place])
            for stack, grad_TB in enumerate(grad_KTB):
                rows = (stack, slice(band.first, band.last))
                if needs_x:
                    weight_BD = weight_KQD[rows]
                    grad_x = grad_TB @ weight_BD if grad_x is None else grad_x.addmm_(grad_TB, weight_BD)
                if grad_weight is not None:
                    grad_weight[rows].addmm_(grad_TB.t(), x_TD)
                if grad_bias is not None:
                    grad_bias[rows] += grad_TB.sum(0)
        if scattered:
            # A bag of rows for every token, and a bag of tokens for every row that has a pair.
            given_N, token_N, stack_N, row_N = (torch.cat([x[p] for p in scattered]) for x in (grad_N, *pairs_N))
            flat_row_N = stack_N * weight_KQD.shape[1] + row_N
            if needs_x:
                token_U, sums_UD = _bags(weight_KQD.flatten(0, 1), given_N, flat_row_N, token_N)
                if grad_x is None and len(token_U) == len(x_TD):
                    grad_x = sums_UD  # the tokens ascend, each once
                else:
                    grad_x = (torch.zeros_like(x_TD) if grad_x is None else grad_x).index_add_(0, token_U, sums_UD)
            if grad_weight is not None:
                grad_weight.flatten(0, 1).index_add_(0, *_bags(x_TD, given_N, token_N, flat_row_N))
            if grad_bias is not None:
                grad_bias.view(-1).add_(sums_at(given_N, flat_row_N, grad_bias.numel()))
        return grad_x, grad_weight, grad_bias, None, None, None


def _bags(table_MD: Tensor, weight_N: Tensor, place_N: Tensor, bag_N: Tensor) -> tuple[Tensor, Tensor]:
    """The U bags that occur, and for each the sum of its ``weight_N`` * ``table_MD[place_N]``, (U, D)."""
    bag_N, order_N = bag_N.sort(stable=True)
    bag_U, count_U = bag_N.unique_consecutive(return_counts=True)
    start_U = count_U.cumsum(0) - count_U
    weight_N = weight_N.index_select(0, order_N)
    return bag_U, F.embedding_bag(
        place_N.index_select(0, order_N), table_MD, start_U, per_sample_weights=weight_N, mode="sum"
    )


def _flat_places(product_KTB: Tensor, pairs: Pairs, first: int) -> Tensor:
    _, num_tokens, width = product_KTB.shape
    return (pairs.stack_N * num_tokens + pairs.token_N) * width + (pairs.row_N - first)


def _dense_is_cheaper(x_TD: Tensor, weight_KQD: Tensor, band: Band) -> bool:
    return band.count * DENSE_GAIN >= len(x_TD) * len(weight_KQD) * (band.last - band.first)
