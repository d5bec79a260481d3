"""The models whose examples are one token each: shapes, an empty batch, gradients everywhere, targets of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.gates import CometConfig, TopKConfig
from dist_moe.models import MoEModel, RecommenderConfig, RunShape, TwoImageClassifierConfig
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from dist_moe.search import PermutationSearchConfig
from tests.models.shares import assert_shares

RECOMMENDER: dict[str, Any] = {"embedding_dim": 4, "experts": {"units": 5}, "tower_units": 7}
IMAGES: dict[str, Any] = {"experts": {"channels": (2, 3), "units": (5, 4)}, "head_units": (4, 6)}
SEARCH = PermutationSearchConfig(epochs=1)
families = pytest.mark.parametrize("family", ["recommender", "images"])


def build(family: str, world: World | None = None, targets: int = 2, **options: Any) -> MoEModel:
    torch.manual_seed(0)
    run, options = RunShape(world or SingleWorld(), 10), {"num_experts": 6} | options
    if family == "recommender":
        return RecommenderConfig(**(RECOMMENDER | options)).build(20, 30, run, targets)
    return TwoImageClassifierConfig(**(IMAGES | options)).build(16, 3, run, targets)


def batch_of(family: str, size: int) -> tuple[Tensor, ...]:
    if family == "images":
        return (torch.rand(size, 16**2),)
    return torch.randint(20, (size,)), torch.randint(30, (size,))


@families
@pytest.mark.parametrize("gate", [CometConfig(), TopKConfig()])
@pytest.mark.parametrize("permutation", [None, SEARCH])
@pytest.mark.parametrize("batch", [0, 1, 13])
def test_output_shapes_and_gradients_for_any_batch(family: str, batch: int, gate: Any, permutation: Any) -> None:
    model = build(family, gate=gate, permutation=permutation)
    model.tables["moe"].begin_step()
    output = model(*batch_of(family, batch))
    shape = (batch,) if family == "recommender" else (batch, 3)
    assert [prediction.shape for prediction in output.predictions] == [shape] * 2
    assert len(output.layers[0].outputs) == 2
    torch.stack([*(x.sum() for x in output.predictions), *output.aux.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@families
def test_every_parameter_learns_something(family: str) -> None:
    if family == "recommender":
        model, batch = build(family, permutation=SEARCH), batch_of(family, 200)
    else:
        config = TwoImageClassifierConfig(num_experts=3, permutation=SEARCH)
        model, batch = config.build(20, 10, RunShape(SingleWorld(), 10)), (2 * torch.rand(64, 400),)
    model.tables["moe"].begin_step()
    output = model(*batch)
    sums = [(x * torch.randn_like(x)).sum() for x in output.predictions]
    torch.stack([*sums, *output.aux.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad if "embedding" in name or name.startswith("moe.experts") else [parameter.grad]
        assert all(row.any() for row in rows), name


@families
def test_each_target_has_its_own_gate_and_head(family: str) -> None:
    model, batch = build(family).eval(), batch_of(family, 5)
    before = model(*batch).predictions
    with torch.no_grad():
        model.moe_layers["moe"].gates[1].leaf_weight.mul_(50)
        heads = model.get_submodule("towers" if family == "recommender" else "heads")
        heads[1][-1].bias.add_(1)  # type: ignore[index]
    after = model(*batch).predictions
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


@families
@pytest.mark.parametrize("targets", [1, 3])
def test_any_number_of_targets(family: str, targets: int) -> None:
    predictions = build(family, targets=targets)(*batch_of(family, 4)).predictions
    assert [len(prediction) for prediction in predictions] == [4] * targets


@families
def test_share_of_every_rank_is_that_of_one_process(family: str) -> None:
    assert_shares(EmulatedWorld(3).run(lambda world: build(family, world)), build(family))
