"""Equal to Hugging Face's Llama and Mixtral on the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.gates import TopKConfig
from dist_moe.models import Transformer
from tests.helpers.transformers import VOCABULARY, make_transformer, random_tokens

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "max_position_embeddings": 64,
}


def llama(tied: bool) -> tuple[Transformer, nn.Module]:
    ours = make_transformer(moe_every=0, rope_theta=500.0, tied_embeddings=tied)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=6, tie_word_embeddings=tied)
    return ours, transformers.LlamaForCausalLM(config)


def mixtral(tied: bool) -> tuple[Transformer, nn.Module]:
    ours = make_transformer(moe_every=1, rope_theta=500.0, tied_embeddings=tied, gate=TopKConfig(k=2))
    config = transformers.MixtralConfig(
        **SIZES, intermediate_size=5, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=tied
    )
    config._experts_implementation = "eager"  # the default wants rows of whole 16 bytes
    return ours, transformers.MixtralForCausalLM(config)


def theirs_from_ours(ours: Transformer) -> dict[str, Tensor]:
    """Our weights under their names, in their layouts."""
    found = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.head.weight,
    }
    for i, layer in enumerate(ours.layers):
        prefix = f"model.layers.{i}"
        found[f"{prefix}.input_layernorm.weight"] = layer.attention_norm.weight
        found[f"{prefix}.post_attention_layernorm.weight"] = layer.feed_forward_norm.weight
        for theirs, mine in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            found[f"{prefix}.self_attn.{theirs}_proj.weight"] = getattr(layer.attention, mine).weight
        if layer.moe is None:
            for name in ("gate", "up", "down"):
                found[f"{prefix}.mlp.{name}_proj.weight"] = getattr(layer.dense, name).weight
        else:
            bank = layer.moe.experts
            found[f"{prefix}.mlp.gate.weight"] = layer.moe.gates[0].weight
            found[f"{prefix}.mlp.experts.gate_up_proj"] = torch.cat([bank.gate, bank.up], dim=2).transpose(1, 2)
            found[f"{prefix}.mlp.experts.down_proj"] = bank.down.transpose(1, 2)
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("build", [llama, mixtral])
def test_same_logits_and_same_gradients(build: Any, tied: bool) -> None:
    ours, theirs = build(tied)
    weights = theirs_from_ours(ours)
    assert {name for name, _ in theirs.named_parameters()} | {"lm_head.weight"} == weights.keys()
    theirs.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    token_BS, target_BS = random_tokens(3, 9), random_tokens(3, 9, seed=1)
    logits = [ours(token_BS).predictions[0], theirs(input_ids=token_BS).logits]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    losses = [F.cross_entropy(x.flatten(0, 1), target_BS.flatten()) for x in logits]
    for loss in losses:
        loss.backward()
    mine, their_grads = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        (own,) = (key for key, parameter in mine.items() if parameter is weights[name])
        torch.testing.assert_close(mine[own].grad, their_grads[name].grad, rtol=1e-4, atol=1e-6, msg=name)
