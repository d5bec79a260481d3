"""Products of pairs against their plain reference: values, all gradients, dense and scattered bands."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from dist_moe.kernels import (
    Band,
    Pairs,
    dense_products,
    products_of_band,
    select,
    sparse_products,
    sparse_products_reference,
)
from tests.helpers.oracle import assert_all_same, assert_same, gradients
from tests.kernels.cases import drawn

MODULE = sys.modules["dist_moe.kernels.sparse_products"]
TOKENS, STACKS, ROWS, DIM = 6, 2, 15, 3
BANDS = [(0, 3), (3, 7), (7, 15)]


def make_inputs(dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> dict[str, Tensor]:
    shapes = {"x": (tokens, DIM), "weight": (STACKS, ROWS, DIM), "bias": (STACKS, ROWS)}
    return {name: drawn(*shape, dtype=dtype) for name, shape in shapes.items()}


def draw_pairs(share: float, tokens: int = TOKENS) -> tuple[Pairs, list[Band]]:
    """In any order within a band, each with probability ``share``."""
    generator = torch.Generator().manual_seed(7)
    parts, bands = [], []
    for first, last in BANDS:
        place_N3 = (torch.rand(tokens, STACKS, last - first, generator=generator) < share).nonzero()
        place_N3 = place_N3[torch.randperm(len(place_N3), generator=generator)]
        parts.append(place_N3 + torch.tensor([0, 0, first]))
        bands.append(Band(len(place_N3), first, last))
    return Pairs(*torch.cat(parts).unbind(1)), bands


@pytest.mark.parametrize("gain", [0, 4, 10**9])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_reference(gain: int, share: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "DENSE_GAIN", gain)
    inputs, (pairs, bands) = make_inputs(dtype), draw_pairs(share)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    expected_N = sparse_products_reference(*inputs.values(), pairs)
    actual_N = sparse_products(*inputs.values(), pairs, bands)
    known_N = sparse_products(*inputs.values(), pairs, bands, expected_N.detach())
    assert torch.equal(known_N, expected_N)
    assert_same(actual_N, expected_N, tolerance)
    cotangent_N = torch.randn(len(pairs), dtype=dtype)
    expected = gradients((expected_N * cotangent_N).sum(), inputs)
    for values_N in (actual_N, known_N):
        gradient_of = torch.autograd.grad(
            (values_N * cotangent_N).sum(), list(inputs.values()), allow_unused=True, materialize_grads=True
        )
        assert_all_same(dict(zip(inputs, gradient_of, strict=True)), expected, tolerance)


def test_both_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pairs go one by one, many by one product over their band."""
    inputs, taken = make_inputs(), []

    def counted(*arguments: object) -> Tensor:
        taken.append(arguments[3:])
        return dense_products(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(MODULE, "dense_products", counted)
    few, many = (draw_pairs(share)[0] for share in (0.01, 1.0))
    products_of_band(*inputs.values(), few, Band(0, 0, ROWS))
    assert taken == []
    products_of_band(*inputs.values(), many, Band(len(many), 0, ROWS))
    assert taken == [(0, ROWS)]


def test_no_tokens_give_gradients_of_zeros() -> None:
    inputs, (pairs, bands) = make_inputs(tokens=0), draw_pairs(1.0, tokens=0)
    sparse_products(*inputs.values(), pairs, bands).sum().backward()
    for value in inputs.values():
        assert value.grad is not None
        assert value.grad.shape == value.shape
        assert not value.grad.any()


def test_only_the_gradients_that_are_asked_for() -> None:
    inputs, (pairs, bands) = make_inputs(), draw_pairs(0.2)
    expected = gradients(sparse_products_reference(*inputs.values(), pairs).sum(), inputs)
    for name, value in inputs.items():
        others = {other: each.detach() for other, each in inputs.items()} | {name: value}
        (grad,) = torch.autograd.grad(sparse_products(*others.values(), pairs, bands).sum(), value)
        assert_same(grad, expected[name], 1e-13)


@pytest.mark.parametrize("gain", [0, 10**9])
def test_tokens_and_cotangents_that_are_not_contiguous(gain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "DENSE_GAIN", gain)
    inputs, (pairs, bands) = make_inputs(), draw_pairs(0.3)
    inputs["x"] = torch.randn(DIM, TOKENS, dtype=torch.float64).T.requires_grad_()
    cotangent_N = torch.randn(len(pairs), 2, dtype=torch.float64)[:, 0]
    results = [sparse_products(*inputs.values(), pairs, bands), sparse_products_reference(*inputs.values(), pairs)]
    actual, expected = (gradients((values_N * cotangent_N).sum(), inputs) for values_N in results)
    assert_all_same(actual, expected, 1e-13)


def test_dense_products_hold_every_pair() -> None:
    inputs, (pairs, _) = make_inputs(), draw_pairs(1.0)
    place = pairs.row_N >= 4
    kept = Pairs(pairs.token_N[place], pairs.stack_N[place], pairs.row_N[place])
    x_TD, weight_KQD, bias_KQ = (value.detach() for value in inputs.values())
    product_KTB = dense_products(x_TD, weight_KQD, bias_KQ, 4, ROWS)
    assert product_KTB.shape == (STACKS, TOKENS, ROWS - 4)
    assert_same(select(product_KTB, kept, 4), sparse_products_reference(x_TD, weight_KQD, bias_KQ, kept), 1e-13)


def test_counts_that_do_not_fit_are_refused() -> None:
    inputs, (pairs, bands) = make_inputs(), draw_pairs(0.5)
    with pytest.raises(ValueError, match="do not fit the bands"):
        sparse_products(*inputs.values(), pairs, bands[:-1])
