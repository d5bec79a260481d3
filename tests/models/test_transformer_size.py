"""The formulas of parameters and FLOPs against what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dist_moe.gates import AdaMoEConfig, CometConfig, HashRoutingConfig, SMoEDropoutConfig, TopKConfig
from dist_moe.models import Transformer
from dist_moe.search import PermutationSearchConfig
from tests.helpers.transformers import SMALL, VOCABULARY, make_transformer, random_tokens

CASES: dict[str, dict[str, Any]] = {
    "dense": {"moe_every": 0},
    "untied, one key head": {"moe_every": 0, "kv_heads": 1, "tied_embeddings": False},
    "comet": {"gate": CometConfig(k=2, gamma=1.0), "kv_heads": None},
    "comet+": {"gate": CometConfig(k=3, gamma=1.0), "permutation": PermutationSearchConfig(epochs=1)},
    "top_k everywhere": {"gate": TopKConfig(k=2), "moe_every": 1, "layers": 3},
    "normalised queries and keys": {"gate": TopKConfig(k=2), "qk_norm": "all"},
    "shared expert": {"gate": TopKConfig(k=1), "shared_hidden": 3},
    "gated shared expert": {"gate": TopKConfig(k=1), "shared_hidden": 3, "shared_gate": True},
    "wide heads with biases": {"gate": TopKConfig(k=1), "head_dim": 6, "qkv_bias": True, "qk_norm": "head"},
    "ada_moe": {"gate": AdaMoEConfig(k=2, null_slots=3)},
    "hash": {"gate": HashRoutingConfig()},
    "smoe_dropout": {"gate": SMoEDropoutConfig(k_min=3, k_max=3)},
}
LENGTH = 7


def count(model: Transformer, *, of_experts: bool) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if (".experts." in name) == of_experts)


@pytest.mark.parametrize("case", CASES)
def test_number_of_parameters(case: str) -> None:
    model = make_transformer(**CASES[case])
    experts, rest = count(model, of_experts=True), count(model, of_experts=False)
    assert model.size.num_params() == experts + rest
    assert model.size.active_params(0) == rest
    assert model.size.active_params(1.5) == rest + 1.5 * experts / SMALL["num_experts"]


def test_layers_of_different_numbers_of_experts() -> None:
    model = make_transformer(gate=TopKConfig(k=2), layers=4, experts_by_layer=(1, 3))
    assert [layer.experts.num_experts for layer in model.moe_layers.values()] == [1, 3]
    assert model.size.num_params() == sum(p.numel() for p in model.parameters())
    assert [table.table.tolist() for table in model.tables.values()] == [[[[0, 0, 0, 0]]], [[[0, 1, 2, 0]]]]
    for counts, error in (((5, 1), "at most num_experts=4"), ((3,), "give 2 numbers")):
        (wrong,) = model.config.model_copy(update={"experts_by_layer": counts}).validation_errors()
        assert error in wrong
    assert list(model.config.expert_counts(["next"]).values()) == [1, 3]


def test_by_hand() -> None:
    """V D + layers (2 D D + 2 D K) + norms + a dense and a mixed layer, with K = 4 the width of both key heads."""
    model = make_transformer(gate=TopKConfig(k=2))
    attention = 2 * (2 * 8 * 8 + 2 * 8 * 4)
    dense, expert, router = 3 * 8 * 6, 3 * 8 * 5, 4 * 8
    assert model.size.num_params() == VOCABULARY * 8 + attention + 5 * 8 + dense + 4 * expert + router + 4
    forward = attention + dense + 2 * expert + router + VOCABULARY * 8 + 2 * 2 * LENGTH * 8
    assert model.size.flops_per_token(LENGTH, 2) == 2 * forward
    assert model.training_flops_per_token(LENGTH, 2) == 6 * forward


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_that_torch_counts(case: str) -> None:
    """Products of the experts included, for the number of experts per token that the model reports."""
    model = make_transformer(**CASES[case])
    model.eval()
    token_BS = random_tokens(3, LENGTH)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        layers = model(token_BS).layers
    measured = sum(layer.rows_computed for layer in layers) / (len(layers) * token_BS.numel()) if layers else 0.0
    expected = model.size.flops_per_token(LENGTH, measured)
    assert counter.get_total_flops() / token_BS.numel() == pytest.approx(expected, rel=1e-9)
