"""Inputs of the kernels, and a comparison with the references in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dist_moe.kernels import FeedForwardWeights
from tests.helpers.oracle import assert_all_same, assert_same, gradients


def drawn(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def networks_of(
    counts: Sequence[int], gated: int, bias: int, dtype: torch.dtype = torch.float64, width: int = 4, hidden: int = 6
) -> tuple[Tensor, FeedForwardWeights]:
    """Rows of ``width`` numbers, and a network for each group of them."""
    groups, out = len(counts), width + 3
    weights = FeedForwardWeights(
        drawn(groups, width, hidden, dtype=dtype),
        drawn(groups, hidden, out, dtype=dtype),
        drawn(groups, width, hidden, seed=8, dtype=dtype) if gated else None,
        drawn(groups, hidden, dtype=dtype) if bias else None,
        drawn(groups, out, dtype=dtype) if bias else None,
    )
    return drawn(sum(counts), width, dtype=dtype), weights


def leaves_of(x_ND: Tensor, weights: FeedForwardWeights) -> dict[str, Tensor]:
    return {"x": x_ND} | {name: weight for name, weight in weights._asdict().items() if weight is not None}


def in_fp64(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().cpu().double().requires_grad_() for name, leaf in leaves.items()}


def assert_like_fp64(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor], leaves: dict[str, Tensor], tolerance: float
) -> None:
    """``ours`` of the leaves and ``reference`` of the same in fp64: values and gradients by a random cotangent."""
    exact = in_fp64(leaves)
    actual, expected = ours(**leaves), reference(**exact)
    assert_same(actual.double(), expected, tolerance)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(actual.dtype)
    actual_grads = gradients((actual * cotangent).sum(), leaves)
    expected_grads = gradients((expected * cotangent.double()).sum(), exact)
    assert all(actual_grads[name].dtype == leaves[name].dtype for name in leaves)
    assert_all_same({name: grad.double() for name, grad in actual_grads.items()}, expected_grads, tolerance)


def zero_and_not(weights: Sequence[Tensor | None]) -> list[list[bool]]:
    """For each weight and each group, whether its gradient, which must be there, is not 0."""
    grads = [weight.grad for weight in weights if weight is not None]
    assert all(grad is not None for grad in grads)
    return [[bool(each.any()) for each in grad] for grad in grads if grad is not None]
