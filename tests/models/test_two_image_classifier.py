"""The paper's classifier of two overlaid images: sizes, initialisation, the naive model, and split over ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dist_moe.engine.checkpoint import place_weights
from dist_moe.errors import UserError
from dist_moe.gates import CometConfig, TopKConfig
from dist_moe.models import ModelOutput, RunShape, TwoImageClassifier, TwoImageClassifierConfig
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from tests.experts.naive_banks import naive_expert, randomise_biases
from tests.helpers.oracle import assert_all_same, assert_same, gradients, naive_gate, naive_gradients
from tests.models.shares import joined

SIDE = 16
NUM_CLASSES = 3
SIZES: dict[str, Any] = {
    "num_experts": 6,
    "experts": {"channels": (2, 3), "units": (5, 4)},
    "head_units": (4, 6),
}


def build_config(
    config: TwoImageClassifierConfig, side: int, num_classes: int, world: World | None = None
) -> TwoImageClassifier:
    torch.manual_seed(0)
    return config.build(side, num_classes, RunShape(world or SingleWorld(), 10))


def build(world: World | None = None, **options: Any) -> TwoImageClassifier:
    return build_config(TwoImageClassifierConfig(**(SIZES | options)), SIDE, NUM_CLASSES, world)


def paper_model() -> TwoImageClassifier:
    return build_config(TwoImageClassifierConfig(), 36, 10)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def loss_of(output: ModelOutput, weight_GBC: Tensor) -> Tensor:
    """Sum of the weighted logits of this rank's images."""
    return sum(((logits * w).sum() for logits, w in zip(output.predictions, weight_GBC, strict=True)), torch.zeros(()))


def test_number_of_parameters_at_the_paper_sizes() -> None:
    model = paper_model()
    conv = (25 * 10 + 10) + (250 * 20 + 20)
    expert = conv + (720 * 50 + 50) + (50 * 50 + 50)
    head = 2 * (50 * 50 + 50) + 50 * 10 + 10
    assert count(model.moe.experts) == 5 * expert
    assert count(model.moe.gates[0]) == 2 * 9 * 1297  # k (2n-1) (p+1), p=1296, n=5, k=2
    assert [count(part) for part in model.heads] == [head, head]
    assert count(model) == 5 * expert + 2 * 2 * 9 * 1297 + 2 * head


@pytest.mark.parametrize("head_units", [(), (4,), (4, 6)])
def test_layers_of_the_heads(head_units: tuple[int, ...]) -> None:
    widths = [4, *head_units, NUM_CLASSES]
    for head in build(head_units=head_units).heads:
        dense = [layer for layer in head if isinstance(layer, torch.nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in dense] == list(pairwise(widths))
        assert [type(layer) for layer in head][1::2] == [torch.nn.ReLU] * len(head_units)


def test_heads_are_glorot_uniform_with_zero_biases() -> None:
    model = paper_model()
    for head in model.heads:
        for layer, fans in zip(head[::2], (100, 100, 60), strict=True):
            bound = (6 / fans) ** 0.5
            assert 0.97 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert not layer.bias.any()
    assert not torch.equal(model.heads[0][0].weight, model.heads[1][0].weight)


def naive_model(model: TwoImageClassifier, image_BD: Tensor) -> list[Tensor]:
    """Every expert on every image, weighted by every gate; heads as plain matrix products."""
    experts = range(model.moe.experts.num_experts)
    results_BEF = torch.stack([torch.stack([naive_expert(model.moe.experts, e, x) for e in experts]) for x in image_BD])
    predictions = []
    for gate, head in zip(model.moe.gates, model.heads, strict=True):
        mixture_BE, _ = naive_gate(gate, image_BD)
        x_BF = (mixture_BE.unsqueeze(2) * results_BEF).sum(1)
        for layer in head[:-1:2]:
            x_BF = (x_BF @ layer.weight.T + layer.bias).clamp(min=0)
        predictions.append(x_BF @ head[-1].weight.T + head[-1].bias)
    return predictions


def noisy_model(world: World | None = None) -> TwoImageClassifier:
    """fp64, no bias at zero, and gates that exclude some experts."""
    model = build(world, gate=CometConfig(gamma=1.0)).double()
    randomise_biases(model.moe.experts)
    for gate in model.moe.gates:
        torch.nn.init.normal_(gate.split_weight, std=0.1)
    for head in model.heads:
        for layer in head[::2]:
            torch.nn.init.uniform_(layer.bias, -0.2, 0.2)
    return model


def test_values_and_gradients_equal_the_naive_model() -> None:
    model = noisy_model()
    image_BD = torch.rand(4, SIDE**2, dtype=torch.float64)
    output = model(image_BD)
    expected = naive_model(model, image_BD)
    assert 0 < output.layers[0].rows_computed < 4 * 6  # some pairs are skipped
    for actual, logits in zip(output.predictions, expected, strict=True):
        assert_same(actual, logits)
    weight_GBC = torch.randn(2, 4, NUM_CLASSES, dtype=torch.float64)
    leaves = dict(model.named_parameters())
    expected_loss = sum(((logits * w).sum() for logits, w in zip(expected, weight_GBC, strict=True)), torch.zeros(()))
    assert_all_same(gradients(loss_of(output, weight_GBC), leaves), naive_gradients(expected_loss, leaves))


@pytest.mark.parametrize("images_per_rank", [[3, 4], [2, 0, 3]])
def test_ranks_equal_one_process(images_per_rank: list[int]) -> None:
    whole = noisy_model()
    batch = sum(images_per_rank)
    image_BD = torch.rand(batch, SIDE**2, dtype=torch.float64)
    weight_GBC = torch.randn(2, batch, NUM_CLASSES, dtype=torch.float64)
    images, weights = image_BD.split(images_per_rank), weight_GBC.split(images_per_rank, dim=1)

    def run_rank(world: World) -> tuple[ModelOutput, dict[str, Tensor]]:
        model = build(world).double()
        place_weights(model, dict(whole.named_parameters()))
        output = model(images[world.rank])
        return output, gradients(loss_of(output, weights[world.rank]), dict(model.named_parameters()))

    results = EmulatedWorld(len(images_per_rank)).run(run_rank)
    output = whole(image_BD)
    for g, logits in enumerate(output.predictions):
        assert_same(torch.cat([result.predictions[g] for result, _ in results]), logits)
    expected = gradients(loss_of(output, weight_GBC), dict(whole.named_parameters()))
    assert_all_same(joined([grads for _, grads in results]), expected)


def test_configuration_survives_a_round_trip() -> None:
    config = TwoImageClassifierConfig(**SIZES, gate=TopKConfig(k=3))
    assert TwoImageClassifierConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": 1},
        {"experts": {"channels": [10]}},
        {"experts": {"units": [50, 0]}},
        {"head_units": [50, 0]},
        {"name": "x"},
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        TwoImageClassifierConfig(**options)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected tokens of shape \(T, 256\)"):
        build()(torch.rand(2, 100))


def test_images_that_are_too_small_for_convolutions_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.experts\.name=conv: rows of 225 numbers are no square image .*; use"):
        TwoImageClassifierConfig(**SIZES).build(15, NUM_CLASSES, RunShape(SingleWorld(), 10))
