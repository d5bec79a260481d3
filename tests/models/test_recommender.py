"""The paper's recommender: its size, its first weights, and experts of other types."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_moe.gates import CometConfig, TopKConfig
from dist_moe.models import Recommender, RecommenderConfig, RunShape
from dist_moe.parallel import SingleWorld
from dist_moe.search import PermutationSearchConfig

MOVIELENS = (6040, 3706)


def build(num_users: int = 20, num_items: int = 30, **options: Any) -> Recommender:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_dim": 4, "num_experts": 6, "experts": {"units": 5}, "tower_units": 7}
    return RecommenderConfig(**(sizes | options)).build(num_users, num_items, RunShape(SingleWorld(), 10))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def expected_count(users: int, items: int, emb: int, n: int, hidden: int, tower: int, gate: int, tables: int) -> int:
    dim = 2 * emb
    experts = n * (dim * hidden + hidden)
    towers = 2 * (hidden * tower + tower + tower + 1)
    return (users + items) * emb + experts + 2 * gate + towers + tables * n * n


def test_number_of_parameters_at_the_paper_sizes() -> None:
    model, top_k = (
        RecommenderConfig(gate=gate).build(*MOVIELENS, RunShape(SingleWorld(), 3076))
        for gate in (CometConfig(), TopKConfig(k=2))
    )
    assert count(top_k.moe.gates[0]) == 4_112
    assert count(model.moe.gates[0]) == 15_934  # k (2n-1) (p+1), p=256, n=16, k=2
    assert count(model) == expected_count(*MOVIELENS, 128, 16, 256, 256, gate=15_934, tables=0) == 2_464_126


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tables", [0, 1])
def test_number_of_parameters_at_other_sizes(k: int, tables: int) -> None:
    permutation = PermutationSearchConfig() if tables else None
    model = build(gate=CometConfig(k=k), permutation=permutation)
    assert count(model) == expected_count(20, 30, 4, 6, 5, 7, gate=k * 11 * 9, tables=tables)


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


@pytest.mark.parametrize("experts", [{"name": "feed_forward", "hidden": 5}, {"name": "conv", "channels": [2, 3]}])
def test_any_type_of_expert(experts: dict[str, Any]) -> None:
    config = RecommenderConfig.model_validate({"embedding_dim": 128, "num_experts": 4, "experts": experts})
    assert not list(config.validation_errors())
    model = config.build(20, 30, RunShape(SingleWorld(), 10))
    predictions = model(torch.arange(5), torch.arange(5)).predictions
    assert [prediction.shape for prediction in predictions] == [(5,)] * 2


def test_rows_that_are_no_images_are_refused() -> None:
    config = RecommenderConfig.model_validate({"embedding_dim": 100, "experts": "conv"})
    (error,) = config.validation_errors()
    assert error.startswith(
        "experts.name=conv: rows of 200 numbers are no square image of at least 16 x 16 pixels; use "
    )
