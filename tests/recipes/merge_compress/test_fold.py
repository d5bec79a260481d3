"""Slot maps folded into routers: what can be said exactly is, the rest is the best that a row can say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.engine.checkpoint import place_weights
from dist_moe.errors import UserError
from dist_moe.gates import CometConfig, TopKConfig
from dist_moe.models import RunShape, Transformer
from dist_moe.models.hugging_face.decoder import saved_weights
from dist_moe.models.layer_stream import Flow
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.merge_compress.fold import RIDGE, StoredDecoder, compare, fit_rows, fold
from tests.helpers.transformers import make_transformer, random_tokens

RUN = RunShape(SingleWorld(), 1)
GATE = TopKConfig(k=2, bias=False)
TABLES = ([0, 2, 1, 0, 2, 0], [1, 1, 0, 2, 2, 2])


def merged(scores: str = "softmax_after", **options: Any) -> Transformer:
    """Two mixtures of 3 experts behind 6 slots each."""
    gate = GATE.model_copy(update={"scores": scores})
    model = make_transformer(gate=gate, moe_every=1, num_experts=3, num_slots=6, **options).eval()
    for table, order in zip(model.tables.values(), TABLES, strict=True):
        table.table.copy_(torch.tensor(order))  # type: ignore[attr-defined]
    with torch.no_grad():
        for layer in model.moe_layers.values():
            layer.gates[0].weight.mul_(3)
    return model


def stored(model: Transformer) -> StoredDecoder:
    return StoredDecoder(model.config, saved_weights(model), RUN)


def test_rows_are_those_of_a_loop() -> None:
    """Ridge regression of log-sum-exp on the inputs of the router, towards the weighted mean; single slots stay."""
    model, token_NS = merged(), random_tokens(30, 7)
    layer, flow = model.layers[0], Flow.begin(model.config, saved_weights(model), token_NS)
    slots = [torch.tensor([2]), torch.tensor([0, 3, 5]), torch.tensor([1, 4])]
    found = fit_rows(layer, flow, slots)
    with torch.no_grad():
        x_TD = layer.attend(model.embedding(token_NS), flow.table())[1].flatten(0, 1).double().numpy()
    weight_SD = layer.moe.gates[0].weight.detach().double().numpy()
    logit_TS = x_TD @ weight_SD.T
    share_TS = np.exp(logit_TS) / np.exp(logit_TS).sum(axis=1, keepdims=True)
    assert found[0].equal(layer.moe.gates[0].weight[2])
    for expert in (1, 2):
        mine = slots[expert].numpy()
        usage = share_TS[:, mine].sum(axis=0)
        mean = usage @ weight_SD[mine] / usage.sum()
        target = np.log(np.exp(logit_TS[:, mine]).sum(axis=1))
        penalty = RIDGE * (x_TD**2).sum() / x_TD.shape[1]
        wide = np.concatenate([x_TD, np.sqrt(penalty) * np.eye(x_TD.shape[1])])
        best = np.linalg.lstsq(wide, np.concatenate([target, np.sqrt(penalty) * mean]), rcond=None)[0]
        assert found[expert].detach().numpy() == pytest.approx(best, abs=1e-5)
        errors = [float(((x_TD @ row - target) ** 2).mean()) for row in (best, mean)]
        assert errors[0] < errors[1], "worth fitting"


@pytest.mark.parametrize("scores", ["softmax_after", "softmax_before"])
def test_pruned_slots_fold_exactly(scores: str) -> None:
    """Slots in any order, some excluded; the gate's k, where fewer are left, too."""
    model = merged(scores)
    kept = ([3, 1, 2], [3, 5, 2])
    for table, layer, slot in zip(model.tables.values(), model.moe_layers.values(), kept, strict=True):
        allowed_S = torch.zeros(6, dtype=torch.bool)
        allowed_S[slot] = True
        layer.gates[0].allow(allowed_S)
        table.table.flatten()[slot] = torch.tensor([1, 2, 0])  # type: ignore[attr-defined]
    config = model.config.model_copy(update={"slot_masks": True})
    before = StoredDecoder(config, saved_weights(model), RUN)
    after, exact = fold(before, random_tokens(1, 2))
    assert exact
    assert after.config.num_slots is None
    assert not after.config.slot_masks
    plain = after.config.build(11, RUN).eval()
    place_weights(plain, after.weights)
    token_BS = random_tokens(6, 9)
    with torch.no_grad():
        torch.testing.assert_close(plain(token_BS).predictions[0], model(token_BS).predictions[0], rtol=1e-6, atol=1e-6)


def test_merged_slots_fold_with_an_error_that_is_told() -> None:
    model = merged()
    after, exact = fold(stored(model), random_tokens(40, 9))
    assert not exact
    folded = after.config.build(11, RUN).eval()
    place_weights(folded, after.weights)
    token_BS, target_BS = random_tokens(6, 9, seed=3), random_tokens(6, 9, seed=4)
    found = compare(stored(model), after, token_BS, target_BS)
    with torch.no_grad():
        one, other = (each(token_BS).predictions[0] for each in (model, folded))
    assert found["largest_difference"] == pytest.approx(float((one - other).abs().max()), rel=1e-4)
    assert found["mean_difference"] == pytest.approx(float((one - other).abs().mean()), rel=1e-4)
    assert found["divergence"] > 0
    assert compare(after, after, token_BS, target_BS)["largest_difference"] == 0


def test_what_cannot_be_folded() -> None:
    tokens = random_tokens(1, 2)
    uneven = make_transformer(gate=GATE, moe_every=1, experts_by_layer=(3, 2))
    with pytest.raises(UserError, match=r"experts_by_layer=\[3, 2\]: .* --grouping uniform"):
        fold(stored(uneven), tokens)
    for gate in (CometConfig(k=2), TopKConfig(k=2), TopKConfig(k=2, bias=False, bias_update_rate=0.1)):
        with pytest.raises(UserError, match="only a Top-k router without bias"):
            fold(stored(make_transformer(gate=gate, moe_every=1)), tokens)
    lonely = merged()
    next(iter(lonely.tables.values())).table.copy_(torch.tensor([0, 0, 2, 2, 2, 0]))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="experts to which no slot leads"):
        fold(stored(lonely), tokens)
