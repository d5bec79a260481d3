"""Alignment and merging against what must hold of them: permutations, limits, the law of the error, what stays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_moe.engine.checkpoint import place_weights
from dist_moe.engine.checkpoint.models import weights_of
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.experts import BertFeedForwardBank, FeedForwardBank
from dist_moe.gates import TopKConfig
from dist_moe.models import Transformer
from dist_moe.recipes.merge_compress import merge as merging
from dist_moe.recipes.merge_compress.align import alignment, alignment_by_activations, reordered
from dist_moe.recipes.merge_compress.compress import num_parameters
from dist_moe.recipes.merge_compress.group import Leaders
from dist_moe.recipes.merge_compress.merge import MergedLayer, merged_weights, orders, shares, weight_similarity
from tests.experts.naive_banks import naive_expert
from tests.helpers.oracle import assert_same, naive_gate
from tests.helpers.pool import on_ranks
from tests.helpers.transformers import make_transformer, random_tokens

LAYER, HIDDEN = "layers.1.moe", 5
BANKS = {
    "plain": lambda: FeedForwardBank(4, HIDDEN, 3, range(3), activation="relu"),
    "gated with biases": lambda: FeedForwardBank(4, HIDDEN, 3, range(3), activation="silu", gated=True, bias=True),
    "bert": lambda: BertFeedForwardBank(4, HIDDEN, 3, range(3), dropout=0.0),
}


def random_bank(name: str) -> FeedForwardBank:
    torch.manual_seed(2)
    bank: FeedForwardBank = BANKS[name]().double()
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.rand_like(parameter))
    return bank


@pytest.mark.parametrize("name", BANKS)
def test_a_planted_order_is_found_and_changes_no_result(name: str) -> None:
    bank = random_bank(name)
    order_H = torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(3))
    x_TD = torch.randn(6, 4, dtype=torch.float64)
    before = torch.stack([naive_expert(bank, 2, x_D) for x_D in x_TD])
    planted = {n: reordered(p[2].detach(), n, order_H, bank.hidden_axes) for n, p in bank.named_parameters()}
    reference = {n: p[2].detach() for n, p in bank.named_parameters()}
    for found_H in (
        alignment(reference, planted, bank.hidden_axes),
        alignment_by_activations(reference, planted, bank, x_TD),
    ):
        assert order_H[found_H].tolist() == list(range(HIDDEN))
    with torch.no_grad():
        for n, parameter in bank.named_parameters():
            parameter[2] = planted[n]
    assert order_H.tolist() != list(range(HIDDEN))
    assert_same(torch.stack([naive_expert(bank, 2, x_D) for x_D in x_TD]), before, 1e-14)


@pytest.mark.parametrize("name", BANKS)
def test_the_order_is_the_best_of_all(name: str) -> None:
    """By the products of all weights into and out of the units that take each other's place."""
    bank = random_bank(name)
    axes = bank.hidden_axes
    ours, theirs = ({n: p[e].detach() for n, p in bank.named_parameters() if n in axes} for e in (0, 1))

    def products(order_H: Sequence[int]) -> float:
        order = torch.tensor(order_H)
        return sum(float((ours[n] * reordered(theirs[n], n, order, axes)).sum()) for n in ours)

    assert alignment(ours, theirs, axes).tolist() == list(max(permutations(range(HIDDEN)), key=products))


@pytest.mark.parametrize("name", BANKS)
def test_the_order_by_activations_correlates_best(name: str) -> None:
    """The activations are those of the naive expert's loop; a unit that never changes has no correlation."""
    bank = random_bank(name)
    with torch.no_grad():
        for parameter in (p for n, p in bank.named_parameters() if n in ("up", "gate", "up_bias")):
            parameter[1].select(-1, 3).zero_()
    x_TD = torch.randn(9, 4, dtype=torch.float64)
    experts = [{n: p[e].detach() for n, p in bank.named_parameters()} for e in (0, 1)]
    act = {"relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu}[str(bank.activation)]
    units_2TH = np.zeros((2, 9, HIDDEN))
    for e, t, h in product(range(2), range(9), range(HIDDEN)):
        into = {n: float(x_TD[t] @ experts[e][n][:, h]) for n in ("up", "gate") if n in experts[e]}
        up = into["up"] + (float(experts[e]["up_bias"][h]) if "up_bias" in experts[e] else 0.0)
        units_2TH[e, t, h] = (
            float(act(torch.tensor(into["gate"], dtype=torch.float64))) * up
            if "gate" in into
            else float(act(torch.tensor(up, dtype=torch.float64)))
        )
    centred_2TH = units_2TH - units_2TH.mean(axis=1, keepdims=True)
    norm_2H = np.linalg.norm(centred_2TH, axis=1)
    assert norm_2H[1, 3] == 0
    assert (norm_2H > 0).sum() == 2 * HIDDEN - 1 or name == "plain"  # a ReLU may be dead by itself

    def correlation(order_H: Sequence[int]) -> float:
        pairs = [(norm_2H[0, h] * norm_2H[1, o], h, o) for h, o in enumerate(order_H)]
        return sum(float(centred_2TH[0, :, h] @ centred_2TH[1, :, o]) / scale for scale, h, o in pairs if scale)

    found = alignment_by_activations(experts[0], experts[1], bank, x_TD).tolist()
    assert correlation(found) == pytest.approx(max(map(correlation, permutations(range(HIDDEN)))))


def order_by_half_of_the_tokens() -> list[int]:
    bank, x_TD = random_bank("plain"), torch.randn(9, 4, dtype=torch.float64, generator=torch.manual_seed(8))
    experts = [{n: p[e].detach() for n, p in bank.named_parameters()} for e in (0, 1)]
    with process_groups(LaunchEnvironment.read(), ParallelConfig()) as groups:
        rank, size = groups.environment.rank, groups.environment.world_size
        order_H = alignment_by_activations(experts[0], experts[1], bank, x_TD[rank::size])
    return list(order_H.tolist())


def test_the_order_by_activations_is_that_of_all_ranks_tokens() -> None:
    (alone,), shared = (on_ranks(world, order_by_half_of_the_tokens) for world in (1, 2))
    assert shared == [alone, alone]


def small() -> Transformer:
    return make_transformer(gate=TopKConfig(k=2)).double().eval()


def merge(model: Transformer, leader_E: list[int], weight_E: list[float], *, align: bool = True) -> Transformer:
    """The model with the groups of its one MoE layer merged by the library, in fp64."""
    weights, axes = weights_of(model), model.moe_layers[LAYER].experts.hidden_axes
    axes = {name: axis for name, axis in axes.items() if f"{LAYER}.experts.{name}" in weights}
    leaders: Leaders = np.array(leader_E)
    order_EH = orders(weights, LAYER, leaders, axes) if align else None
    layer = MergedLayer(leaders, shares(leaders, np.array(weight_E)), order_EH, axes)
    table = layer.expert_E[model.tables[LAYER].table]
    merged = merged_weights(weights, {LAYER: layer}, {f"{LAYER}.slot_map.table": table})
    count = len(set(leader_E))
    assert num_parameters(merged) == unique_numbers(model) - (4 - count) * 3 * 8 * HIDDEN
    smaller = make_transformer(gate=TopKConfig(k=2), num_slots=4, experts_by_layer=(count,)).double().eval()
    place_weights(smaller, merged)
    assert num_parameters(merged) == unique_numbers(smaller)
    return smaller


def unique_numbers(model: Transformer) -> int:
    """Parameters by their storages, each once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values()) // torch.float64.itemsize


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(random_tokens(3, 6)).predictions[0])


def copied(model: Transformer, expert: int, source: int, *, permuted: bool) -> None:
    """Make ``expert`` a copy of ``source``, its units in another order."""
    bank = model.moe_layers[LAYER].experts
    order_H = torch.tensor([3, 0, 4, 1, 2]) if permuted else torch.arange(HIDDEN)
    with torch.no_grad():
        for name, parameter in bank.named_parameters():
            parameter[expert] = reordered(parameter[source].clone(), name, order_H, bank.hidden_axes)


def test_limits() -> None:
    """Groups of one, equal experts, permuted copies, and all the weight on one expert."""
    model = small()
    assert logits(merge(model, [0, 1, 2, 3], [1, 1, 1, 1])).equal(logits(model))
    one_hot = merge(model, [2, 1, 2, 1], [0, 1, 1, 0])
    bank, theirs = one_hot.moe_layers[LAYER].experts, model.moe_layers[LAYER].experts
    assert all(p.equal(theirs.get_parameter(name)[[1, 2]]) for name, p in bank.named_parameters())
    for permuted in (False, True):
        copied(model, 2, 0, permuted=permuted)
        copied(model, 3, 1, permuted=permuted)
        assert_same(logits(merge(model, [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4])), logits(model), 1e-13)
    assert not torch.allclose(logits(merge(model, [0, 1, 0, 1], [1, 1, 1, 1], align=False)), logits(model))
    assert shares(np.array([0, 0, 2]), np.zeros(3)).tolist() == [0.5, 0.5, 1.0]


def test_weights_are_compared_in_the_order_of_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_COLUMNS_AT_ONCE", 7)
    model = small()
    copied(model, 3, 1, permuted=True)
    weights, axes = weights_of(model), {"up": 2, "gate": 2, "down": 1}
    plain = weight_similarity(weights, LAYER, None, axes)
    aligned = weight_similarity(weights, LAYER, orders(weights, LAYER, np.array([1, 1, 1, 1]), axes), axes)
    assert plain[1, 3] < 0.99 < aligned[1, 3] == pytest.approx(1)
    flat = torch.stack([torch.cat([weights[f"{LAYER}.experts.{n}"][e].flatten() for n in axes]) for e in range(4)])
    assert plain == pytest.approx(torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=2).numpy())


def test_a_merged_model_is_the_naive_loop_over_its_slots() -> None:
    """Values and gradients of the merged layer, in fp64: each slot's weight times its expert's result."""
    merged = merge(small(), [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4])
    layer = merged.moe_layers[LAYER]
    x_TD = torch.randn(12, 8, dtype=torch.float64)
    found = []
    for naive in (False, True):
        x = x_TD.clone().requires_grad_()
        if naive:
            weight_TS, _ = naive_gate(layer.each_gate[0], x)
            expert_S = merged.tables[LAYER].table.flatten().tolist()
            assert sorted(expert_S) == [0, 0, 1, 1]
            rows = [
                sum(w * naive_expert(layer.experts, e, x_D) for w, e in zip(weight_S, expert_S, strict=True) if w)
                for x_D, weight_S in zip(x, weight_TS, strict=True)
            ]
            y_TD = torch.stack([torch.as_tensor(row) for row in rows])
        else:
            y_TD = layer(x).outputs[0]
        parameters = dict(layer.named_parameters())
        gradients = torch.autograd.grad(y_TD.square().sum(), [x, *parameters.values()])
        found.append([y_TD.detach(), *gradients])
    for name, ours, theirs in zip(["y", "x", *parameters], *found, strict=True):
        assert_same(ours, theirs, 1e-12, name)


@pytest.mark.parametrize("ratio", [0.25, 0.7])
def test_error_of_a_pair_and_a_pair_is_computed_once(ratio: float) -> None:
    """Experts that differ in their last matrix are linear in it, so that a merged one gives the mean of their results.

    Its squared error is (g_i + g_j)^2 (r - a)^2 |f_i - f_j|^2 with r = g_i / (g_i + g_j); gates are as before.
    """
    model = small()
    bank = model.moe_layers[LAYER].experts
    with torch.no_grad():
        for name in ("up", "gate"):
            bank.get_parameter(name)[3] = bank.get_parameter(name)[1]
    merged = merge(model, [0, 1, 2, 1], [1, ratio, 1, 1 - ratio], align=False)
    ours, theirs = model.moe_layers[LAYER], merged.moe_layers[LAYER]
    assert all(p.equal(q) for p, q in zip(ours.gates.parameters(), theirs.gates.parameters(), strict=True))
    x_TD = torch.randn(40, 8, dtype=torch.float64)
    before, after = ours(x_TD), theirs(x_TD)
    weight_TE = before.routes[0].dense()
    assert theirs.gates[0](x_TD).dense().equal(weight_TE)
    aliased_T = (weight_TE[:, 1] != 0) & (weight_TE[:, 3] != 0)
    assert aliased_T.any()
    assert after.rows_computed == 2 * 40 - int(aliased_T.sum())
    for x_D, g_E, was_D, is_D in zip(x_TD, weight_TE, before.outputs[0], after.outputs[0], strict=True):
        f_i, f_j = naive_expert(bank, 1, x_D), naive_expert(bank, 3, x_D)
        both = g_E[1] + g_E[3]
        r = g_E[1] / both if both else both
        law = both**2 * (r - ratio) ** 2 * (f_i - f_j).square().sum()
        assert_same((is_D - was_D).square().sum(), law, 1e-14)
