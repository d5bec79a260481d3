"""Rows of tokens and their weighted sums against plain tensor operations: values, all gradients, empties, order."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dist_moe.kernels import TokenIndex, rows_of_tokens, stable_order, weighted_scatter, weighted_scatter_reference

SIZES = [(0, 0), (0, 3), (1, 1), (5, 9), (700, 90), (1500, 40)]


def make_index(rows: int, tokens: int) -> TokenIndex:
    generator = torch.Generator().manual_seed(rows + tokens)
    return TokenIndex.of(torch.randint(max(tokens, 1), (rows,), generator=generator), tokens)


@pytest.mark.parametrize(("rows", "tokens"), SIZES)
def test_index_names_each_token_s_rows_in_their_order(rows: int, tokens: int) -> None:
    index = make_index(rows, tokens)
    expected = [[n for n in range(rows) if index.token_N[n] == t] for t in range(tokens)]
    assert [index.row_N.tolist()[a:b] for a, b in pairwise(index.start_T1.tolist())] == expected
    assert index.num_tokens == tokens


@pytest.mark.parametrize("bound", [2, 2**16, 2**16 + 1])
def test_stable_order_on_both_sides_of_the_radix_sort_s_bound(bound: int) -> None:
    key_N = torch.randint(max(bound - 3, 0), bound, (500,))
    assert torch.equal(stable_order(key_N, bound), key_N.argsort(stable=True))


@pytest.mark.parametrize(("rows", "tokens"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_tokens_equal_an_index(rows: int, tokens: int, dtype: torch.dtype) -> None:
    index = make_index(rows, tokens)
    x_TD = torch.randn(tokens, 70).to(dtype).requires_grad_()
    cotangent = torch.randn(rows, 70).to(dtype)
    ours, expected = rows_of_tokens(x_TD, index), x_TD[index.token_N]
    assert torch.equal(ours, expected)
    grads = [torch.autograd.grad(result, x_TD, cotangent)[0] for result in (ours, expected)]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("rows", "tokens"), SIZES)
@pytest.mark.parametrize("gates", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weighted_scatter_equals_reference(rows: int, tokens: int, gates: int, dtype: torch.dtype) -> None:
    index = make_index(rows, tokens)
    generator = torch.Generator().manual_seed(rows + tokens)
    rows_NF = torch.randn(rows, 130, generator=generator).to(dtype)
    weight_GN = torch.rand(gates, rows, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    grad_GTF = torch.randn(gates, tokens, 130, generator=generator).to(weight_GN.dtype)
    results = []
    for function in (weighted_scatter, weighted_scatter_reference):
        inputs = [rows_NF.clone().requires_grad_(), weight_GN.clone().requires_grad_()]
        output = function(inputs[0], inputs[1], index)
        output.backward(grad_GTF)
        results.append([output.detach(), *(x.grad for x in inputs)])
    for ours, reference in zip(*results, strict=True):
        assert ours is not None
        # The reference adds the gates' gradients in bf16, the kernel in fp32.
        tolerance = {
            torch.bfloat16: {"rtol": 0.02, "atol": 0.05},
            torch.float32: {"rtol": 1e-5, "atol": 1e-4},
            torch.float64: {"rtol": 1e-12, "atol": 1e-12},
        }[dtype]
        torch.testing.assert_close(ours, reference, **tolerance)


def test_rows_gradients_and_weights_that_are_not_contiguous() -> None:
    index = make_index(40, 7)
    rows_NF = torch.randn(6, 40, dtype=torch.float64).T.requires_grad_()
    weight_GN = torch.rand(40, 2, dtype=torch.float64).T.requires_grad_()
    cotangent = torch.randn(7, 6, 2, dtype=torch.float64).permute(2, 0, 1)
    grads = [
        torch.autograd.grad(function(rows_NF, weight_GN, index), [rows_NF, weight_GN], cotangent)
        for function in (weighted_scatter, weighted_scatter_reference)
    ]
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needed", ["rows", "weights"])
def test_only_the_gradient_that_is_needed_is_computed(needed: str) -> None:
    index = make_index(40, 7)
    rows_NF, weight_GN = torch.randn(40, 6), torch.rand(1, 40)
    leaf: Tensor = (rows_NF if needed == "rows" else weight_GN).requires_grad_()
    other = weight_GN if needed == "rows" else rows_NF
    weighted_scatter(rows_NF, weight_GN, index).sum().backward()
    assert leaf.grad is not None
    assert other.grad is None
