"""The layer of one rank on a real GPU: as on the CPU, without the host waiting, also as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from dist_moe.experts import FeedForwardBank
from dist_moe.gates import Comet, Gate, TopK
from dist_moe.layer import MoE
from tests.helpers.oracle import gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTH, HIDDEN, EXPERTS, TOKENS = 64, 96, 8, 500


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def make(gate: str) -> MoE:
    torch.manual_seed(1)
    built: Gate = Comet(WIDTH, EXPERTS, k=2) if gate == "comet" else TopK(WIDTH, EXPERTS, k=2, balance_weight=0.1)
    return MoE(built, FeedForwardBank(WIDTH, HIDDEN, EXPERTS, range(EXPERTS), activation="silu", gated=True))


def step_of(moe: MoE, x_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    moe.begin_step(0)
    output = moe(x_TD)
    loss = torch.stack([output.outputs[0].square().sum(), *output.aux.values()]).sum()
    found = gradients(loss, dict(moe.named_parameters()) | {"x": x_TD})
    moe.end_step()
    return output.outputs[0].detach(), found


@pytest.mark.parametrize("gate", ["top_k", "comet"])
def test_equals_the_cpu(gate: str) -> None:
    on_cpu = make(gate).double()
    on_gpu = deepcopy(on_cpu).cuda()
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64).requires_grad_()
    expected, expected_grads = step_of(on_cpu, x_TD)
    actual, actual_grads = step_of(on_gpu, x_TD.detach().cuda().requires_grad_())
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-9, atol=1e-9)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(actual_grads[name].cpu(), grad, rtol=1e-9, atol=1e-9, msg=name)


def test_the_same_bits_every_time() -> None:
    moe, x_TD = make("top_k").cuda(), torch.randn(TOKENS, WIDTH, device="cuda").requires_grad_()
    (first, first_grads), (second, second_grads) = step_of(moe, x_TD), step_of(moe, x_TD)
    assert torch.equal(first, second)
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_top_k_never_waits(dtype: torch.dtype) -> None:
    moe = make("top_k").cuda().to(dtype)
    x_TD = torch.randn(TOKENS, WIDTH, device="cuda", dtype=dtype).requires_grad_()
    step_of(moe, x_TD)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step_of(moe, x_TD)


def test_the_whole_layer_as_a_cuda_graph() -> None:
    moe, x_TD = make("top_k").cuda().eval().requires_grad_(False), torch.randn(TOKENS, WIDTH, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        moe(x_TD)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TF = moe(x_TD).outputs[0]
    x_TD.copy_(torch.randn_like(x_TD))
    graph.replay()
    torch.testing.assert_close(y_TF, moe(x_TD).outputs[0], rtol=0, atol=0)
