"""OLMoE: normalised queries and keys. transformers' values and gradients on its weights, there and back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.errors import UserError
from dist_moe.gates import CometConfig, TopKConfig
from dist_moe.models.hugging_face.decoder import read_decoder, write_decoder
from dist_moe.models.hugging_face.families import plainest_architecture
from dist_moe.search import SlotTable
from tests.helpers.transformers import VOCABULARY, make_transformer, random_tokens
from tests.models.hugging_face.directories import assert_same_directories, reconfigure
from tests.models.hugging_face.test_decoder import SIZES, logits, read_into_fresh

transformers = pytest.importorskip("transformers")

EXPERTS = 4
OURS: dict[str, Any] = {"moe_every": 1, "qk_norm": "all", "tied_embeddings": False, "experts": {"hidden": 8}}


def save_olmoe(directory: Path, **options: Any) -> Any:
    """Random weights, those of norms included."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 12, "num_key_value_heads": 2, "num_experts": EXPERTS, "num_experts_per_tok": 3}
    model = transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(**(SIZES | sizes | {"pad_token_id": None} | options))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)) if "norm" in name else parameter.mul_(10)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("renormalised", [False, True])
def test_there_and_back_to_the_bit_with_its_values_and_gradients(tmp_path: Path, renormalised: bool) -> None:
    theirs = save_olmoe(tmp_path / "theirs", norm_topk_prob=renormalised)
    checkpoint, ours = read_into_fresh(tmp_path / "theirs")
    scores = "softmax_after" if renormalised else "softmax_before"
    assert checkpoint.config.gate == TopKConfig(k=3, bias=False, scores=scores)
    assert ours.size.num_params() == sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    write_decoder(ours, tmp_path / "again", like=checkpoint)
    read = assert_same_directories(tmp_path / "theirs", tmp_path / "again")
    assert len(read) == 3 + SIZES["num_hidden_layers"] * (6 + 2 + 1 + 3 * EXPERTS)
    token_BS = random_tokens(3, 9)
    ours_BSV, theirs_BSV = ours(token_BS).predictions[0], theirs(input_ids=token_BS).logits
    torch.testing.assert_close(ours_BSV, theirs_BSV, rtol=1e-5, atol=1e-5)
    for logits_BSV in (ours_BSV, theirs_BSV):
        logits_BSV.square().sum().backward()
    for layer, other in zip(ours.layers, theirs.model.layers, strict=True):
        attention, norms = layer.attention, other.self_attn
        for one, same in ((attention.query_norm, norms.q_norm), (attention.key_norm, norms.k_norm)):
            assert one.weight.grad.abs().max() > 1e-3
            torch.testing.assert_close(one.weight.grad, same.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(attention.key.weight.grad, norms.k_proj.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.moe.gates[0].weight.grad, other.mlp.gate.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scores", ["softmax_before", "softmax_after"])
def test_our_model_is_written_as_one(tmp_path: Path, scores: str) -> None:
    """With a permutation of the experts, which is folded into the router."""
    model = make_transformer(gate=TopKConfig(k=2, bias=False, scores=scores), layers=3, **OURS).eval()
    for layer in model.moe_layers.values():
        assert isinstance(layer.slot_map, SlotTable)
        layer.slot_map.table.copy_(torch.tensor([[[2, 0, 3, 1]]]))
    assert write_decoder(model, tmp_path / "written") == "olmoe"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32).eval()
    assert isinstance(theirs, transformers.OlmoeForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=random_tokens(3, 9)).logits, logits(model), rtol=1e-5, atol=1e-5)
    _, back = read_into_fresh(tmp_path / "written")
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-6, atol=1e-6)
    assert back.embedding.num_embeddings == VOCABULARY


def test_what_has_no_place(tmp_path: Path) -> None:
    stock = TopKConfig(k=2, bias=False)
    plain = make_transformer(gate=stock, **(OURS | {"qk_norm": "none"}))
    assert plainest_architecture(plain.config) == "mixtral"
    for architecture in ("olmoe", "llama"):
        with pytest.raises(UserError, match="cannot be written as"):
            write_decoder(plain, tmp_path / "x", architecture=architecture)
    with pytest.raises(UserError, match=r"model\.qk_norm=all: .* cannot be written as MixtralForCausalLM"):
        write_decoder(make_transformer(gate=stock, **OURS), tmp_path / "x", architecture="mixtral")
    assert plainest_architecture(make_transformer(gate=CometConfig(k=2, gamma=1.0), **OURS).config) == "dist_moe"
    wide = make_transformer(gate=stock, **OURS, head_dim=6)
    with pytest.raises(UserError, match=r"model\.head_dim=6: .* cannot be written as OlmoeForCausalLM"):
        write_decoder(wide, tmp_path / "x", architecture="olmoe")
    sigmoid = make_transformer(gate=TopKConfig(k=2, bias=False, scores="sigmoid"), **OURS)
    with pytest.raises(UserError, match=r"model\.gate\.scores=sigmoid"):
        write_decoder(sigmoid, tmp_path / "x", architecture="olmoe")
    save_olmoe(tmp_path / "clipped")
    with pytest.raises(UserError, match=r"clip_qkv=8\.0; supported: None"):
        read_decoder(reconfigure(tmp_path / "clipped", clip_qkv=8.0))
