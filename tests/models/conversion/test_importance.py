"""Importance of neurons: per-example gradients one after another, finite differences, and what it must not be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_moe.models import BertClassifier, BertOutput, BertShape
from dist_moe.models.conversion import neuron_importance
from tests.helpers.berts import LENGTHS, SHAPE, build, dense, labels_of, texts
from tests.helpers.oracle import assert_same

Batch = tuple[Tensor, Tensor, Tensor]


def inputs_of(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch[0], batch[1]


def losses_of(output: BertOutput, batch: Batch) -> Tensor:
    return F.cross_entropy(output.predictions[0], batch[2], reduction="none")


def batches(*sizes: int) -> list[Batch]:
    token_BS, length_B = texts()
    parts = (tensor.split(sizes) for tensor in (token_BS, length_B, labels_of(len(LENGTHS))))
    return list(zip(*parts, strict=True))


def importance(model: BertClassifier, *sizes: int) -> Tensor:
    return neuron_importance(model, batches(*sizes), inputs_of, losses_of)


def inner_products(model: BertClassifier, batch: Batch) -> tuple[Tensor, Tensor]:
    """(L, H) each: <w1, dL/dw1> and <w2, dL/dw2> of the summed loss of a batch, by autograd."""
    loss = losses_of(model(*inputs_of(batch)), batch).sum()
    rows = []
    for block in model.dense_layers().values():
        up, down = torch.autograd.grad(loss, (block.up.weight, block.down.weight), retain_graph=True)
        rows.append(((up * block.up.weight).sum(1), (down * block.down.weight).sum(0)))
    first, second = zip(*rows, strict=True)
    return torch.stack(first), torch.stack(second)


@pytest.mark.parametrize("sizes", [(4,), (1, 1, 1, 1), (3, 1)], ids=str)
def test_equals_gradients_of_one_example_after_another(sizes: tuple[int, ...]) -> None:
    model = dense()
    expected = sum(sum(inner_products(model, batch)).abs() for batch in batches(1, 1, 1, 1))
    actual = importance(model, *sizes)
    assert actual.shape == (SHAPE.layers, SHAPE.hidden)
    assert (actual > 1e-6).all()
    assert_same(actual, expected, 1e-12)


def test_gradient_of_the_batch_is_another_thing() -> None:
    model = dense()
    (whole,) = batches(4)
    shortcut = sum(inner_products(model, whole)).abs()
    assert (importance(model, 4) > 1.2 * shortcut).double().mean() > 0.5


@pytest.mark.parametrize(("layer", "neuron"), [(0, 3), (1, 0), (2, 15)])
def test_equals_finite_differences_of_scaling_both_weights(layer: int, neuron: int) -> None:
    model = dense()
    block = model.dense_layers()[layer]
    step, expected = 1e-5, 0.0

    def loss_with(scale: float, batch: Batch) -> float:
        with torch.no_grad():
            rows = (block.up.weight[neuron], block.down.weight[:, neuron])
            kept = [row.clone() for row in rows]
            for row in rows:
                row.mul_(scale)
            loss = losses_of(model(*inputs_of(batch)), batch).sum().item()
            for row, before in zip(rows, kept, strict=True):
                row.copy_(before)
        return loss

    for batch in batches(1, 1, 1, 1):
        expected += abs(loss_with(1 + step, batch) - loss_with(1 - step, batch)) / (2 * step)
    assert importance(model, 4)[layer, neuron].item() == pytest.approx(expected, rel=1e-6)


def test_relu_without_biases_gives_both_halves_alike() -> None:
    shape = BertShape(vocab=40, width=12, layers=3, heads=3, hidden=16, positions=10, activation="relu")
    model = build(moe_every=0, shape=shape)
    for block in model.dense_layers().values():
        torch.nn.init.zeros_(block.up.bias)
    expected = torch.zeros(shape.layers, shape.hidden, dtype=torch.float64)
    for batch in batches(1, 1, 1, 1):
        first, second = inner_products(model, batch)
        assert_same(first, second, 1e-12)
        expected += 2 * second.abs()
    assert_same(importance(model, 4), expected, 1e-12)


def test_one_backward_pass_per_batch_and_nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = dense(dropout=0.4), []
    grad = torch.autograd.grad

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[1]))
        return grad(*arguments)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    with torch.no_grad():
        actual = importance(model, 3, 1)
    assert calls == [2 * SHAPE.layers] * 2
    assert_same(actual, importance(dense(), 4), 1e-12)  # dropout is off meanwhile
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_experts_have_none() -> None:
    with pytest.raises(ValueError, match="defined for a dense model; this one has experts"):
        importance(build(moe_every=2), 4)
