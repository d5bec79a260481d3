"""Qwen2-MoE and Qwen3-MoE: transformers' values and gradients on its weights, there and back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.errors import UserError
from dist_moe.gates import TopKConfig
from dist_moe.models.hugging_face.decoder import read_decoder, write_decoder
from tests.helpers.transformers import make_transformer, random_tokens
from tests.models.hugging_face.directories import assert_same_directories, reconfigure, rewrite
from tests.models.hugging_face.test_decoder import SIZES, logits, read_into_fresh

transformers = pytest.importorskip("transformers")

EXPERTS = 4
ROUTER = TopKConfig(k=2, bias=False)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe": ("Qwen2Moe", {"shared_expert_intermediate_size": 7}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 6}),
}
OURS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"qkv_bias": True, "shared_hidden": 3, "shared_gate": True},
    "qwen3_moe": {"qk_norm": "head", "head_dim": 6},
}


def save_qwen(directory: Path, family: str, **options: Any) -> Any:
    """Random weights, those of norms and biases included."""
    torch.manual_seed(0)
    name, fields = FAMILIES[family]
    sizes = {"intermediate_size": 12, "moe_intermediate_size": 8, "num_key_value_heads": 2, "num_experts": EXPERTS}
    config = getattr(transformers, f"{name}Config")(**(SIZES | sizes | fields | {"num_experts_per_tok": 3} | options))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(10)
    model.save_pretrained(directory)
    return model


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "renormalised": {"norm_topk_prob": True},
    "every second layer": {"decoder_sparse_step": 2},
    "every second layer, as a list": {"mlp_only_layers": [0, 2], "tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_to_the_bit_with_its_values_and_gradients(tmp_path: Path, family: str, case: str) -> None:
    theirs = save_qwen(tmp_path / "theirs", family, **CASES[case])
    checkpoint, ours = read_into_fresh(tmp_path / "theirs")
    scores = "softmax_after" if case == "renormalised" else "softmax_before"
    assert checkpoint.config.gate == TopKConfig(k=3, bias=False, scores=scores)
    assert checkpoint.config.moe_every == (2 if "second" in case else 1)
    assert ours.size.num_params() == sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert checkpoint.weights.keys() == {name for name, _ in ours.named_parameters()} - {"head.weight"} | (
        set() if checkpoint.config.tied_embeddings else {"head.weight"}
    )
    write_decoder(ours, tmp_path / "again", like=checkpoint)
    assert_same_directories(tmp_path / "theirs", tmp_path / "again")
    token_BS = random_tokens(3, 9)
    ours_BSV, theirs_BSV = ours(token_BS).predictions[0], theirs(input_ids=token_BS).logits
    torch.testing.assert_close(ours_BSV, theirs_BSV, rtol=1e-5, atol=1e-5)
    for logits_BSV in (ours_BSV, theirs_BSV):
        logits_BSV.square().sum().backward()
    layer, other = ours.layers[1], theirs.model.layers[1]
    pairs = [
        (layer.attention.query.weight, other.self_attn.q_proj.weight),
        (layer.attention.out.weight, other.self_attn.o_proj.weight),
        (layer.moe.gates[0].weight, other.mlp.gate.weight),
    ]
    if family == "qwen3_moe":
        pairs += [(layer.attention.key_norm.weight, other.self_attn.k_norm.weight)]
    else:
        pairs += [
            (layer.attention.value.bias, other.self_attn.v_proj.bias),
            (layer.moe.shared.share.weight, other.mlp.shared_expert_gate.weight),
            (layer.moe.shared.down.weight, other.mlp.shared_expert.down_proj.weight),
        ]
    for one, same in pairs:
        assert same.grad.abs().max() > 1e-3
        torch.testing.assert_close(one.grad, same.grad, rtol=1e-4, atol=1e-4 * float(same.grad.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("moe_every", [1, 2])
def test_our_model_is_written_as_one(tmp_path: Path, family: str, moe_every: int) -> None:
    """With a permutation of the experts, which is folded into the router; no field of config.json is left out."""
    model = make_transformer(gate=ROUTER, experts={"hidden": 8}, layers=4, moe_every=moe_every, **OURS[family]).eval()
    for layer in model.moe_layers.values():
        layer.slot_map.table.copy_(torch.tensor([[[2, 0, 3, 1]]]))
    assert write_decoder(model, tmp_path) == family
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs).__name__ == f"{FAMILIES[family][0]}ForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=random_tokens(3, 9)).logits, logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(read_into_fresh(tmp_path)[1]), logits(model), rtol=1e-6, atol=1e-6)


def test_the_number_of_experts_is_found_under_both_names(tmp_path: Path) -> None:
    save_qwen(tmp_path, "qwen3_moe")
    expected = read_decoder(tmp_path).config
    reconfigure(tmp_path, num_experts=EXPERTS)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"num_local_experts"', '"unknown"'))
    assert read_decoder(tmp_path).config == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_only_layers": [0]}, r"layers with experts are \[1, 2\]; supported: every m-th layer"),
        ({"mlp_only_layers": [0, 1, 2]}, r"layers with experts are \[\]; supported"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers='0'; expected a list"),
        ({"decoder_sparse_step": 5}, "moe_every=5 exceeds layers=3"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0; expected a whole number"),
        ({"use_sliding_window": True}, "use_sliding_window=True; supported: False"),
        ({"attention_bias": True}, "attention_bias=True; supported: False"),
        ({"moe_intermediate_size": 4}, r"has shape .*, and config.json says"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_ours_cannot_follow_is_refused_by_name(
    tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    save_qwen(tmp_path, family)
    with pytest.raises(UserError, match=message):
        read_decoder(reconfigure(tmp_path, **fields))


def test_a_shared_expert_of_another_width_or_without_its_gate_is_named(tmp_path: Path) -> None:
    save_qwen(tmp_path, "qwen2_moe")
    with pytest.raises(UserError, match=r"shared_expert\.\w+_proj\.weight has shape"):
        read_decoder(reconfigure(tmp_path, shared_expert_intermediate_size=8))
    reconfigure(tmp_path, shared_expert_intermediate_size=7)
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("shared_expert_gate.weight")})
    with pytest.raises(UserError, match=r"missing: model\.layers\.0\.mlp\.shared_expert_gate\.weight"):
        read_decoder(tmp_path)
