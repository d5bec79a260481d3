"""Batch normalisation over ranks is torch's of the whole batch: outputs, gradients, running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_moe.layer import BatchNormOverRanks
from dist_moe.parallel import World
from tests.helpers.oracle import assert_same
from tests.helpers.worlds import emulate, on_real_worlds

ROWS, FEATURES = 10, 3
SPLITS = [[10], [5, 5], [7, 3], [1, 0, 9], [4, 3, 2, 1]]


def batches() -> Tensor:
    """Three batches of features with different means and scales."""
    drawn = torch.randn(3, ROWS, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return drawn * torch.tensor([1.0, 20.0, 0.1]) + torch.tensor([5.0, -3.0, 0.0])


def cotangent() -> Tensor:
    return torch.randn(ROWS, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def affine(norm: nn.BatchNorm1d | BatchNormOverRanks) -> None:
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.0, 3.0]))


def passes(norm: nn.BatchNorm1d | BatchNormOverRanks, rows: slice) -> list[Tensor]:
    """Outputs of three training passes and an evaluation, gradients, running statistics."""
    affine(norm)
    outputs, grads = [], []
    for x_BF in batches():
        part = x_BF[rows].clone().requires_grad_()
        outputs.append(norm(part))
        (outputs[-1] * cotangent()[rows]).sum().backward()
        assert part.grad is not None
        grads.append(part.grad)
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    evaluated = norm.eval()(batches()[0][rows])
    of_rows = [*(o.detach() for o in outputs), *grads, evaluated.detach()]
    return [*of_rows, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def on_rank(world: World, sizes: list[int]) -> list[Tensor]:
    start = sum(sizes[: world.rank])
    return passes(BatchNormOverRanks(FEATURES).double(), slice(start, start + sizes[world.rank]))


def assert_whole(by_rank: list[list[Tensor]]) -> None:
    wanted = passes(nn.BatchNorm1d(FEATURES).double(), slice(None))
    joined = list(zip(*by_rank, strict=True))
    for found, whole in zip(joined[:7], wanted[:7], strict=True):
        assert_same(torch.cat(found), whole, 1e-10)
    for found, whole in zip(joined[7:9], wanted[7:9], strict=True):
        assert_same(torch.stack(found).sum(dim=0), whole, 1e-10)
    for found, whole in zip(joined[9:], wanted[9:], strict=True):
        for of_rank in found:
            assert_same(of_rank, whole, 1e-10)


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_equals_torchs_of_the_whole_batch(sizes: list[int]) -> None:
    assert_whole(emulate(len(sizes), lambda world: on_rank(world, sizes)))


def test_real_processes() -> None:
    assert_whole(on_real_worlds(2, on_rank, [6, 4]))


def test_bf16_is_normalised_in_fp32() -> None:
    norm, x_BF = BatchNormOverRanks(FEATURES), batches()[0].bfloat16()
    assert norm(x_BF).dtype == torch.bfloat16
    assert_same(norm(x_BF).float(), norm(x_BF.float()), 0.03)


def test_a_single_example_is_no_nan() -> None:
    norm = BatchNormOverRanks(FEATURES)
    assert norm(torch.ones(1, FEATURES)).tolist() == [[0.0] * FEATURES]
    assert bool(norm.running_var.isfinite().all())
