"""The kernels on a real GPU: against fp64 on the CPU, with all gradients; errors of bf16; CUDA graphs; memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_moe.experts import FeedForwardBank
from dist_moe.kernels import (
    FeedForwardWeights,
    TokenIndex,
    feed_forward,
    feed_forward_reference,
    grouped_linear,
    grouped_linear_reference,
    rows_of_tokens,
    rows_of_tokens_reference,
    weighted_scatter,
    weighted_scatter_reference,
)
from tests.helpers.oracle import gradients
from tests.kernels.cases import in_fp64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
MOST_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
COUNTS = [[0, 0, 0, 0], [100, 0, 30, 1], [0, 700, 0, 0], [129, 128, 127, 64]]


def drawn(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """On the GPU, of variance 1 / fan in for weights."""
    torch.manual_seed(3)
    made = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    scaled = {name: x / x.shape[1] ** 0.5 if x.dim() == 3 else x for name, x in made.items()}
    return {name: x.to("cuda", dtype).requires_grad_() for name, x in scaled.items()}


def assert_near_fp64(actual: Tensor, leaves: dict[str, Tensor], expected: Tensor, exact: dict[str, Tensor]) -> None:
    """Values and gradients differ from those in fp64 by a small part of their largest entry."""
    most = MOST_ERROR[next(iter(leaves.values())).dtype]
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    ours = {"result": actual} | gradients((actual * cotangent.to(actual)).sum(), leaves)
    theirs = {"result": expected} | gradients((expected * cotangent).sum(), exact)
    for name, one in ours.items():
        if one.numel():
            other = theirs[name].detach()
            error = (one.detach().cpu().double() - other).abs().max()
            assert error <= most * other.abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(64, 128), (37, 50)])
@pytest.mark.parametrize(("activation", "gated", "bias"), [("silu", True, False), ("gelu", False, True)])
def test_feed_forward(
    activation: str, gated: bool, bias: bool, width: int, hidden: int, counts: list[int], dtype: torch.dtype
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"x": (sum(counts), width), "up": (4, width, hidden)}
    shapes |= {"down": (4, hidden, width)}
    shapes |= {"gate": (4, width, hidden)} if gated else {}
    shapes |= {"up_bias": (4, hidden), "down_bias": (4, width)} if bias else {}
    leaves = drawn(dtype, **shapes)
    exact = in_fp64(leaves)
    x, *_ = leaves.values()
    weights, exact_weights = (
        FeedForwardWeights(**{name: leaf for name, leaf in of.items() if name != "x"}) for of in (leaves, exact)
    )
    actual = feed_forward(x, weights, activation, torch.tensor(counts, device="cuda"))
    assert_near_fp64(actual, leaves, feed_forward_reference(exact["x"], exact_weights, activation, counts), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_grouped_linear(counts: list[int], dtype: torch.dtype) -> None:
    leaves = drawn(dtype, x_ND=(sum(counts), 70), weight_EDF=(4, 70, 33), bias_EF=(4, 33))
    exact = in_fp64(leaves)
    actual = grouped_linear(**leaves, rows_per_group=torch.tensor(counts, device="cuda"))
    assert_near_fp64(actual, leaves, grouped_linear_reference(**exact, rows_per_group=counts), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "tokens", "gates"), [(0, 3, 1), (900, 200, 1), (900, 2, 3)])
def test_permute_and_weighted_un_permute(rows: int, tokens: int, gates: int, dtype: torch.dtype) -> None:
    token_N = torch.randint(tokens, (rows,), generator=torch.Generator().manual_seed(1))
    index, index_there = TokenIndex.of(token_N, tokens), TokenIndex.of(token_N.cuda(), tokens)
    rows_of = drawn(dtype, rows_NF=(rows, 1100))
    weight_of = drawn(torch.promote_types(dtype, torch.float32), weight_GN=(gates, rows))
    leaves, x_of = rows_of | weight_of, drawn(dtype, x_TD=(tokens, 1100))
    exact, exact_x = in_fp64(leaves), in_fp64(x_of)
    summed = weighted_scatter(**leaves, index=index_there)
    expected = weighted_scatter_reference(**exact, index=index)
    assert_near_fp64(summed, leaves, expected, exact)
    gathered = rows_of_tokens(**x_of, index=index_there)
    assert_near_fp64(gathered, x_of, rows_of_tokens_reference(**exact_x, index=index), exact_x)


def test_errors_in_bf16_are_those_of_rounding_the_factors() -> None:
    """Sums over 4096 products: with sums in bf16 the error would be some 20 times larger."""
    counts = [300, 0, 212]
    leaves = drawn(torch.bfloat16, x=(512, 4096), weight=(3, 4096, 128), bias=(3, 128))
    exact = in_fp64(leaves)
    actual = grouped_linear(*leaves.values(), torch.tensor(counts, device="cuda")).cpu().double()
    expected = grouped_linear_reference(*exact.values(), counts)
    assert ((actual - expected).norm() / expected.norm()).item() < 2**-8


def bank_and_rows(rows: int, width: int, hidden: int, experts: int) -> tuple[FeedForwardBank, Tensor, Tensor]:
    torch.manual_seed(0)
    bank = FeedForwardBank(width, hidden, experts, range(experts), activation="silu", gated=True).cuda().bfloat16()
    x_ND = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    return bank, x_ND, torch.full((experts,), rows // experts, device="cuda")


def test_a_cuda_graph_of_the_experts_serves_other_counts() -> None:
    bank, x_ND, counts_E = bank_and_rows(1024, 128, 256, 8)
    bank.requires_grad_(False)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        bank(x_ND, counts_E)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_ND = bank(x_ND, counts_E)
    counts_E.copy_(torch.tensor([1000, 0, 0, 20, 1, 3, 0, 0]))
    graph.replay()
    replayed = y_ND.clone()
    torch.testing.assert_close(replayed, bank(x_ND, counts_E), rtol=0, atol=0)


def test_the_experts_compile_with_inductor() -> None:
    bank, x_ND, counts_E = bank_and_rows(1024, 128, 256, 8)
    actual, expected = (
        torch.autograd.grad(function(x_ND, counts_E).square().sum(), list(bank.parameters()))
        for function in (torch.compile(bank, fullgraph=True), bank)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def test_peak_memory() -> None:
    bank, x_ND, counts_E = bank_and_rows(64 * 1024, 1024, 2048, 16)
    x_ND.requires_grad_()
    bank(x_ND[:256], counts_E // 256).sum().backward()
    bank.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    y_ND = bank(x_ND, counts_E)
    kept = torch.cuda.memory_allocated()
    assert torch.cuda.max_memory_allocated() <= 1.1 * kept
    grad_ND = torch.ones_like(y_ND)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(y_ND, [x_ND, *bank.parameters()], grad_ND)
    assert torch.cuda.max_memory_allocated() <= 1.1 * (before + sum(grad.nbytes for grad in grads))
