"""A decoder that is read layer by layer says what it says as a whole, under any gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.engine.checkpoint.models import weights_of
from dist_moe.gates import GateContext, TopKConfig
from dist_moe.models import RunShape
from dist_moe.models.layer_stream import Flow, each_layer
from dist_moe.models.transformer import DecoderLayer
from dist_moe.parallel import SingleWorld
from tests.helpers.transformers import EACH_GATE, VOCABULARY, make_transformer, random_tokens

CASES: dict[str, dict[str, Any]] = {name: {"gate": gate} for name, gate in EACH_GATE.items()} | {
    "balanced by a bias": {"gate": TopKConfig(k=2, bias_update_rate=0.1)},
    "merged": {"gate": TopKConfig(k=2), "moe_every": 1, "experts_by_layer": (3, 1), "slot_masks": True},
    "untied, shared": {"gate": TopKConfig(k=2), "tied_embeddings": False, "shared_hidden": 3, "shared_gate": True},
    "heads": {"moe_every": 0, "qk_norm": "head", "head_dim": 6, "qkv_bias": True},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_model(case: str) -> None:
    model = make_transformer(layers=3 if case != "merged" else 2, **CASES[case]).eval()
    run = RunShape(SingleWorld(), 1, GateContext(torch.arange(1, VOCABULARY + 1), 10))
    weights, token_NS, seen = weights_of(model), random_tokens(7, 5), []
    flow = Flow.begin(model.config, weights, token_NS)

    def visit(index: int, layer: DecoderLayer) -> None:
        seen.append(index)
        flow.advance(layer, tokens_at_once=10)

    each_layer(model.config, weights, run, visit)
    with torch.no_grad():
        expected = model(token_NS).predictions[0]
    assert seen == list(range(model.config.layers))
    torch.testing.assert_close(torch.cat(list(flow.logits(weights))), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_read_when_their_layer_comes() -> None:
    """And each of them once."""
    model, read = make_transformer(gate=TopKConfig(k=2), layers=4), []
    weights = weights_of(model)

    def reading(name: str, expert: int | None) -> Tensor:
        read.append((name, expert))
        return weights.read(name, expert)

    before: list[int] = []
    each_layer(
        model.config,
        replace(weights, read=reading),
        RunShape(SingleWorld(), 1),
        lambda index, layer: before.append(len(read)),
    )
    assert len(set(read)) == len(read) == before[-1]
    for index, (first, last) in enumerate(zip([0, *before], before, strict=False)):
        assert {name.split(".")[1] for name, _ in read[first:last]} == {str(index)}
