"""U V + S of whole experts, and S without pruned rows: what is computed stays, what is stored falls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from dist_moe.engine.checkpoint import ModelWeights, place_weights
from dist_moe.engine.checkpoint.models import weights_of
from dist_moe.gates import TopKConfig
from dist_moe.models import MoEModel, RecommenderConfig, RunShape
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.merge_compress import factor
from dist_moe.recipes.merge_compress.compress import num_parameters
from dist_moe.recipes.merge_compress.factor import (
    dropped_weights,
    factored_weights,
    factors,
    kept_rows,
    num_padding,
)
from dist_moe.recipes.merge_compress.prune import least_important
from tests.helpers import berts
from tests.helpers.oracle import assert_same
from tests.helpers.transformers import make_transformer, random_tokens

RANK = 2


def transformer(**options: Any) -> MoEModel:
    return make_transformer(gate=TopKConfig(k=2), **options).double().eval()


def recommender(**options: Any) -> MoEModel:
    torch.manual_seed(1)
    sizes = {"embedding_dim": 4, "num_experts": 4, "experts": {"units": 6}, "tower_units": 5} | options
    return RecommenderConfig.model_validate(sizes).build(9, 9, RunShape(SingleWorld(), 10)).double().eval()


def bert(**options: Any) -> MoEModel:
    return berts.build(**options).double().eval()


def inputs_of(model: MoEModel) -> tuple[Tensor, ...]:
    if hasattr(model, "user_embedding"):
        return torch.arange(9), torch.arange(9)
    return berts.texts() if hasattr(model, "encoder") else (random_tokens(3, 6),)


def outputs(model: MoEModel) -> Tensor:
    with torch.no_grad():
        return torch.cat([p.flatten() for p in model(*inputs_of(model)).predictions])


def matrices(model: MoEModel) -> dict[str, tuple[str, ...]]:
    return {name: layer.experts.matrices for name, layer in model.moe_layers.items()}


def unique_numbers(model: MoEModel) -> int:
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values()) // torch.float64.itemsize


def flops(model: MoEModel) -> float:
    return sum(layer.experts.flops_per_row for layer in model.moe_layers.values())


def pruned(weights: ModelWeights, share: float) -> ModelWeights:
    """A share of all rows is left, those of the largest norm."""
    names = [name.removesuffix("_row_ids") for name in weights if name.endswith("_row_ids")]
    norms = [weights[f"{name}_sparse"].norm(dim=1) for name in names]
    mask = least_important(
        torch.cat([n.flatten() for n in norms]), torch.ones(sum(n.numel() for n in norms)).bool(), share
    )
    tensors = {name: weights[name].clone() for name in weights}
    for name, gone in zip(names, mask.split([n.numel() for n in norms]), strict=True):
        gone_EQ = gone.view(tensors[f"{name}_row_ids"].shape)
        tensors[f"{name}_row_ids"][gone_EQ] = -1
        tensors[f"{name}_sparse"].transpose(1, 2)[gone_EQ] = 0

    def read(name: str, expert: int | None) -> Tensor:
        return tensors[name] if expert is None else tensors[name][expert]

    return ModelWeights(weights.kinds, weights.specs, read)


every_model = pytest.mark.parametrize("make", [transformer, recommender, bert])


@every_model
def test_nothing_changes_until_rows_are_pruned_and_nothing_when_they_are_dropped(make: Callable[..., MoEModel]) -> None:
    model = make()
    layers = matrices(model)
    weights = factored_weights(weights_of(model), layers, RANK)
    whole = make(low_rank={"rank": RANK})
    place_weights(whole, weights)
    assert_same(outputs(whole), outputs(model), 1e-13)
    before = pruned(weights, 0.3)
    place_weights(whole, before)
    assert not torch.allclose(outputs(whole), outputs(model))
    after, rows = dropped_weights(before, layers), kept_rows(before, layers)
    small = make(low_rank={"rank": RANK, "rows": rows})
    place_weights(small, after)
    assert_same(outputs(small), outputs(whole), 1e-14)
    assert num_parameters(before) == unique_numbers(whole)
    assert num_parameters(after) == unique_numbers(small)
    assert num_parameters(after) < num_parameters(before)
    assert num_padding(after, layers) < num_padding(before, layers)
    falls = 0.0
    for of_layer, layer, of_rows in zip(whole.moe_layers.values(), small.moe_layers.values(), rows, strict=True):
        for name, count in of_rows.items():
            dim, outs = of_layer.experts.get_parameter(f"{name}_sparse").shape[1:]
            left = (of_layer.experts.get_buffer(f"{name}_row_ids") >= 0).sum(dim=1)
            assert count == int(left.max())
            falls += 2 * dim * (outs - count)
            if count:
                ids = layer.experts.get_buffer(f"{name}_row_ids")
                assert (ids >= 0).sum(dim=1).equal(left)
    assert flops(whole) - flops(small) == falls
    empty = dropped_weights(pruned(weights, 0.0), layers)
    assert not any(name.endswith(("_sparse", "_row_ids")) for name in empty)
    none = make(low_rank={"rank": RANK, "rows": [dict.fromkeys(of, 0) for of in rows]})
    place_weights(none, empty)
    assert outputs(none).isfinite().all()


def test_factors_are_the_best_of_their_rank() -> None:
    weight = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sigma = torch.linalg.svdvals(weight)
    for rank in range(1, 6):
        into, back = factors(weight, rank)
        assert_same((weight - into @ back).square().sum(), sigma[rank:].square().sum(), 1e-13)
        assert_same(into.norm(dim=0), sigma[:rank].sqrt(), 1e-13)
        assert_same(back.norm(dim=1), sigma[:rank].sqrt(), 1e-13)


def test_every_matrix_is_decomposed_once() -> None:
    model = transformer()
    weights = factored_weights(weights_of(model), matrices(model), RANK)
    with mock.patch.object(factor, "factors", side_effect=factors) as calls:
        for name in weights:
            list(weights.pieces(name))
    assert calls.call_count == 4 * 3


def test_planted_rows_are_found_and_the_rest_is_of_low_rank() -> None:
    """W = L + S, the rows of S few, apart from those of L and weaker: UV is L, and what is left is S to the last row.

    A row whose numbers cancel is among them: the release, which sums up rows, would drop it.
    """
    model = transformer()
    layers = matrices(model)
    bank = next(iter(model.moe_layers.values())).experts
    planted: dict[str, list[list[int]]] = {}
    generator = torch.Generator().manual_seed(0)
    for name in bank.matrices:
        weight_EDF = bank.get_parameter(name)
        experts, dim, outs = weight_EDF.shape
        planted[name] = []
        for expert in range(experts):
            row_D = torch.zeros(dim, dtype=torch.float64)
            row_D[:2] = torch.tensor([1.0, -1.0])
            others = torch.randn(dim, RANK, dtype=torch.float64, generator=generator)
            basis, _ = torch.linalg.qr(torch.cat([row_D.unsqueeze(1), others], dim=1))
            weight = 50 * basis[:, 1:] @ torch.randn(RANK, outs, dtype=torch.float64, generator=generator)
            number = int(torch.randint(outs, (), generator=generator))
            weight[:, number] = row_D
            weight_EDF.data[expert] = weight
            planted[name].append([number])
    weights = factored_weights(weights_of(model), layers, RANK)
    rows = sum(weights.specs[name].shape[1] for name in weights if name.endswith("_row_ids")) * 4
    left = pruned(weights, 12 / rows)
    small = transformer(low_rank={"rank": RANK, "rows": kept_rows(left, layers)})
    place_weights(small, dropped_weights(left, layers))
    assert_same(outputs(small), outputs(model), 1e-11)
    assert num_padding(dropped_weights(left, layers), layers) == 0
    for name, ids in planted.items():
        compact = next(iter(small.moe_layers.values())).experts
        assert compact.get_buffer(f"{name}_row_ids").tolist() == ids
