"""The paper's recommender: size, shapes, an empty batch, and gradients everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_moe.gates import CometConfig, TopKConfig
from dist_moe.models import Recommender, RecommenderConfig, RunShape
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from dist_moe.search import PermutationSearchConfig

MOVIELENS = (6040, 3706)


def build(num_users: int = 20, num_items: int = 30, world: World | None = None, **options: Any) -> Recommender:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_dim": 4, "num_experts": 6, "experts": {"units": 5}, "tower_units": 7}
    return RecommenderConfig(**(sizes | options)).build(num_users, num_items, RunShape(world or SingleWorld(), 10))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def expected_count(users: int, items: int, emb: int, n: int, hidden: int, tower: int, gate: int, tables: int) -> int:
    dim = 2 * emb
    experts = n * (dim * hidden + hidden)
    towers = 2 * (hidden * tower + tower + tower + 1)
    return (users + items) * emb + experts + 2 * gate + towers + tables * n * n


def test_number_of_parameters_at_the_paper_sizes() -> None:
    model = RecommenderConfig().build(*MOVIELENS, RunShape(SingleWorld(), 3076))
    assert count(model.moe.gates[0]) == 15_934  # k (2n-1) (p+1), p=256, n=16, k=2
    assert count(model) == expected_count(*MOVIELENS, 128, 16, 256, 256, gate=15_934, tables=0) == 2_464_126


def test_number_of_top_k_gate_parameters_at_the_paper_sizes() -> None:
    model = RecommenderConfig(gate=TopKConfig(k=2)).build(*MOVIELENS, RunShape(SingleWorld(), 3076))
    assert count(model.moe.gates[0]) == 4_112


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tables", [0, 1])
def test_number_of_parameters_at_other_sizes(k: int, tables: int) -> None:
    permutation = PermutationSearchConfig() if tables else None
    model = build(gate=CometConfig(k=k), permutation=permutation)
    assert count(model) == expected_count(20, 30, 4, 6, 5, 7, gate=k * 11 * 9, tables=tables)


@pytest.mark.parametrize("gate", [CometConfig(), TopKConfig()])
@pytest.mark.parametrize("permutation", [None, PermutationSearchConfig(epochs=1)])
@pytest.mark.parametrize("batch", [0, 1, 13])
def test_output_shapes_and_gradients_for_any_batch(
    batch: int, gate: CometConfig | TopKConfig, permutation: PermutationSearchConfig | None
) -> None:
    model = build(gate=gate, permutation=permutation)
    model.tables["moe"].begin_step()
    output = model(torch.randint(20, (batch,)), torch.randint(30, (batch,)))
    assert [prediction.shape for prediction in output.predictions] == [(batch,), (batch,)]
    assert len(output.layers[0].outputs) == 2
    losses = [*(prediction.sum() for prediction in output.predictions), *output.aux.values()]
    torch.stack(losses).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_every_parameter_learns_something() -> None:
    model = build(permutation=PermutationSearchConfig(epochs=1))
    model.tables["moe"].begin_step()
    generator = torch.Generator().manual_seed(0)
    user_B, item_B = (torch.randint(high, (200,), generator=generator) for high in (20, 30))
    output = model(user_B, item_B)
    weight_GB = torch.randn(2, 200, generator=generator)
    aux = sum(output.aux.values())
    ((torch.stack(output.predictions) * weight_GB).sum() + aux).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad if "embedding" in name or name.startswith("moe.experts") else [parameter.grad]
        assert all(row.any() for row in rows), name


def test_each_task_has_its_own_gate_and_tower() -> None:
    model = build().eval()
    user_B, item_B = torch.arange(5), torch.arange(5)
    before = model(user_B, item_B).predictions
    with torch.no_grad():
        model.moe.gates[1].leaf_weight.mul_(50)
        model.towers[1][2].bias.add_(1)
    after = model(user_B, item_B).predictions
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_user_and_item_both_matter() -> None:
    model = build().eval()
    results = [model(torch.tensor([u]), torch.tensor([i])).predictions[1].item() for u, i in ((0, 0), (1, 0), (0, 1))]
    assert len(set(results)) == 3


def test_initial_ranges() -> None:
    model = build(num_users=500, num_items=500, tower_units=64, experts={"units": 64})
    for embedding in (model.user_embedding, model.item_embedding):
        assert 0.049 < embedding.weight.abs().max() <= 0.05
    for tower in model.towers:
        bound = (6 / 128) ** 0.5
        assert 0.97 * bound < tower[0].weight.abs().max() <= bound
        assert not tower[0].bias.any()


def test_share_of_every_rank_is_that_of_one_process() -> None:
    """Same seed: replicated parameters are equal and experts are the ones of their ids."""
    whole = build()
    for rank, share in enumerate(EmulatedWorld(3).run(lambda world: build(world=world))):
        for name, parameter in share.named_parameters():
            expected = whole.get_parameter(name)
            if name.startswith("moe.experts"):
                expected = expected[2 * rank : 2 * rank + 2]
            assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("experts", [{"name": "feed_forward", "hidden": 5}, {"name": "conv", "channels": [2, 3]}])
def test_any_number_of_targets_and_any_type_of_expert(targets: int, experts: dict[str, Any]) -> None:
    config = RecommenderConfig.model_validate({"embedding_dim": 128, "num_experts": 4, "experts": experts})
    assert not list(config.validation_errors())
    model = config.build(20, 30, RunShape(SingleWorld(), 10), num_targets=targets)
    predictions = model(torch.arange(5), torch.arange(5)).predictions
    assert [prediction.shape for prediction in predictions] == [(5,)] * targets


def test_rows_that_are_no_images_are_refused() -> None:
    config = RecommenderConfig.model_validate({"embedding_dim": 100, "experts": "conv"})
    (error,) = config.validation_errors()
    assert error.startswith(
        "experts.name=conv: rows of 200 numbers are no square image of at least 16 x 16 pixels; use "
    )
