"""Peak memory of the experts at their real sizes, counted over fake tensors: nothing is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dist_moe.kernels import FeedForwardWeights, feed_forward
from tests.helpers.host import PeakMemory

MOST = 1.1
WIDTH, EXPERTS = 2048, 64


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "k", "hidden"), [(16384, 2, 1024), (16384, 8, 4096), (65536, 8, 4096)])
def test_peak_is_that_of_what_goes_in_comes_out_and_is_kept(tokens: int, k: int, hidden: int, gated: bool) -> None:
    with FakeTensorMode():
        x_ND = bf16(tokens * k, WIDTH)
        up, down = bf16(EXPERTS, WIDTH, hidden), bf16(EXPERTS, hidden, WIDTH)
        weights = FeedForwardWeights(up, down, bf16(EXPERTS, WIDTH, hidden) if gated else None)
        leaves = [leaf for leaf in (x_ND, *weights) if leaf is not None]
        counts_E = torch.full((EXPERTS,), tokens * k // EXPERTS)
        inputs = sum(leaf.nbytes for leaf in leaves)
        with PeakMemory() as memory:
            y_ND = feed_forward(x_ND, weights, "silu", counts_E)
            assert memory.peak > y_ND.nbytes
            assert inputs + memory.peak <= MOST * (inputs + memory.live)
            kept, memory.peak = memory.live, 0
            grads = torch.autograd.grad(y_ND, leaves, torch.empty_like(y_ND))
        outputs = sum(grad.nbytes for grad in grads) + y_ND.nbytes
        assert inputs + memory.peak <= MOST * (inputs + kept + outputs)


def bf16(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, requires_grad=True)
