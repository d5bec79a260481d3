"""Hugging Face decoders there and back: bit-equal, and every tensor accounted for by count and by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

from dist_moe.engine.checkpoint import ModelWeights
from dist_moe.errors import UserError
from dist_moe.gates import CometConfig, GateContext, HashRoutingConfig, TopKConfig
from dist_moe.models import RunShape, Transformer
from dist_moe.models.hugging_face.decoder import (
    DecoderCheckpoint,
    open_decoder,
    read_decoder,
    write_decoder,
    write_decoder_weights,
)
from dist_moe.models.hugging_face.files import StoredTensors
from dist_moe.parallel import EmulatedWorld, SingleWorld, World
from dist_moe.search import SlotTable
from tests.helpers.transformers import VOCABULARY, make_transformer, random_tokens
from tests.models.hugging_face.directories import Tensors, assert_same_directories, reconfigure, rewrite
from tests.models.shares import assert_shares

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "grouped, tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "one key head, untied": {"tie_word_embeddings": False, "num_key_value_heads": 1, "rope_theta": 300.0},
}
SOME_PARAMETERS = {
    "embedding.weight": "model.embed_tokens.weight",
    "layers.0.attention.key.weight": "model.layers.0.self_attn.k_proj.weight",
    "norm.weight": "model.norm.weight",
}
EXPERTS = 4
ROUTER = TopKConfig(k=2, bias=False)


def save_llama(directory: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, intermediate_size=12, **options)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def save_mixtral(directory: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, intermediate_size=12, num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=3
    )
    transformers.MixtralForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "llama", **LLAMAS["grouped, tied"])


def fresh(checkpoint: DecoderCheckpoint, world: World | None = None) -> Transformer:
    torch.manual_seed(99)
    context = GateContext(torch.ones(VOCABULARY), 10)
    return checkpoint.config.build(checkpoint.vocab_size, RunShape(world or SingleWorld(), 10, context)).eval()


def read_into_fresh(directory: Path) -> tuple[DecoderCheckpoint, Transformer]:
    checkpoint = read_decoder(directory)
    model = fresh(checkpoint)
    checkpoint.into(model)
    return checkpoint, model


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        return model(random_tokens(3, 9)).predictions[0]


def logits_of_theirs(directory: Path, **options: Any) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(input_ids=random_tokens(3, 9)).logits


@pytest.mark.parametrize("case", [*LLAMAS, "mixtral"])
def test_theirs_to_ours_and_back_is_equal_to_the_bit(tmp_path: Path, case: str) -> None:
    """What transformers wrote, in bf16 or fp32: the same files; the same logits and gradients, every tensor counted."""
    original = tmp_path / "theirs"
    save_mixtral(original) if case == "mixtral" else save_llama(original, **LLAMAS[case])
    checkpoint, model = read_into_fresh(original)
    write_decoder(model, tmp_path / "again", like=checkpoint)
    tensors = assert_same_directories(original, tmp_path / "again")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    token_BS, target_BS = random_tokens(3, 9), random_tokens(3, 9, seed=1)
    ours_BSV, theirs_BSV = model(token_BS).predictions[0], theirs(input_ids=token_BS).logits
    torch.testing.assert_close(ours_BSV, theirs_BSV, rtol=1e-5, atol=1e-5)
    for logits_BSV in (ours_BSV, theirs_BSV):
        F.cross_entropy(logits_BSV.flatten(0, 1), target_BS.flatten()).backward()
    for ours, name in SOME_PARAMETERS.items():
        gradients = [one.get_parameter(which).grad for one, which in ((model, ours), (theirs, name))]
        assert gradients[1].any()
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6, msg=name)
    assert checkpoint.weights.keys() == {name for name, _ in model.named_parameters()}
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters())
    assert model.size.num_params() == sum(p.numel() for p in model.parameters())
    of_layer = 6 + (1 + 3 * EXPERTS if case == "mixtral" else 3)
    assert len(tensors) == 2 + ("untied" in case or case == "mixtral") + of_layer * SIZES["num_hidden_layers"]


def test_a_tied_matrix_that_is_kept_twice_stays_so(directory: Path, tmp_path: Path) -> None:
    def twice(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    checkpoint, model = read_into_fresh(rewrite(directory, twice))
    write_decoder(model, tmp_path / "again", like=checkpoint)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        read_decoder(rewrite(directory, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}))


def test_weights_in_several_files(directory: Path) -> None:
    whole = read_decoder(directory).weights
    transformers.AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="2KB")
    (directory / "model.safetensors").unlink(missing_ok=True)
    assert len(list(directory.glob("model-*.safetensors"))) > 1
    several = read_decoder(directory).weights
    assert several.keys() == whole.keys()
    assert all(torch.equal(several[name], tensor) for name, tensor in whole.items())
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"do not agree on model\.norm\.weight"):
        read_decoder(directory)


def test_missing_and_unknown_tensors_are_named(directory: Path) -> None:
    def damage(tensors: Tensors) -> Tensors:
        query = tensors.pop("model.layers.1.self_attn.q_proj.weight")
        return tensors | {"model.layers.1.self_attn.q_proj.wait": query}

    with pytest.raises(UserError) as error:
        read_decoder(rewrite(directory, damage))
    message = str(error.value)
    assert "missing: model.layers.1.self_attn.q_proj.weight" in message
    assert "unknown: model.layers.1.self_attn.q_proj.wait" in message
    assert "has 29 tensors, LlamaForCausalLM has 29" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2': there is no such decoder here; known: llama, mixtral, olmoe, .*"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; supported: 'silu'"),
        ({"attention_bias": True}, "attention_bias=True; supported: False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1"),
        ({"sliding_window": 128}, "sliding_window=128; supported: None"),
        ({"head_dim": 4}, r"q_proj.weight has shape \(8, 8\), and config.json says \(16, 8\)"),
        ({"head_dim": 3}, "head_dim=3; allowed: an even width"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: .*sliding_att.*; supported: full",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3'; supported: 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_what_ours_cannot_follow_is_refused_by_name(directory: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_decoder(reconfigure(directory, **fields))


def test_a_field_that_is_missing_is_named(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "hidden_size"}))
    with pytest.raises(UserError, match="it has no hidden_size"):
        read_decoder(directory)


def test_another_base_of_rotary_positions_is_read_wherever_it_stands(directory: Path) -> None:
    assert read_decoder(directory).config.rope_theta == 10_000
    reconfigure(directory, rope_parameters=None, rope_theta=77.0)
    assert read_decoder(directory).config.rope_theta == 77


def test_a_rank_takes_its_experts(tmp_path: Path) -> None:
    checkpoint = read_decoder(save_mixtral(tmp_path / "m"))
    whole = fresh(checkpoint)
    checkpoint.into(whole)

    def share(world: World) -> Transformer:
        model = fresh(checkpoint, world)
        checkpoint.into(model)
        return model

    assert_shares(EmulatedWorld(2).run(share), whole)


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({"moe_every": 0}, "llama"),
        ({"moe_every": 1, "gate": ROUTER}, "mixtral"),
        ({"moe_every": 2, "gate": ROUTER}, "dist_moe"),
        ({"moe_every": 1, "gate": TopKConfig(k=2)}, "dist_moe"),
        ({"moe_every": 1, "gate": ROUTER, "shared_hidden": 3}, "dist_moe"),
        ({"moe_every": 1, "gate": ROUTER, "num_slots": 7}, "dist_moe"),
        ({"moe_every": 2, "gate": HashRoutingConfig()}, "dist_moe"),
        ({"moe_every": 2, "gate": CometConfig(k=2), "tied_embeddings": False}, "dist_moe"),
    ],
)
def test_ours_to_theirs_and_back_is_equal_to_the_bit(
    tmp_path: Path, options: dict[str, Any], architecture: str
) -> None:
    """Written as the plainest architecture that fits; and again from what was read."""
    ours = make_transformer(**options).eval()
    assert write_decoder(ours, tmp_path / "first") == architecture
    _, model = read_into_fresh(tmp_path / "first")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert logits(model).equal(logits(ours))
    write_decoder(model, tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_stock_mixtral_has_our_logits_and_our_permutation(tmp_path: Path) -> None:
    """softmax over the kept logits is Mixtral's share of the kept probabilities; slots are relabelled in its router."""
    ours = make_transformer(moe_every=1, gate=ROUTER, experts={"hidden": 8}).eval()
    for table, order in zip(ours.tables.values(), ([2, 0, 3, 1], [1, 2, 3, 0]), strict=True):
        assert isinstance(table, SlotTable)
        table.table.copy_(torch.tensor(order))
    write_decoder(ours, tmp_path, architecture="mixtral")
    expected = logits(ours)
    torch.testing.assert_close(logits_of_theirs(tmp_path), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(read_into_fresh(tmp_path)[1]), expected, rtol=1e-5, atol=1e-5)
    for table in ours.tables.values():
        table.table.copy_(torch.arange(EXPERTS))
    assert (logits(ours) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "architecture", "message"),
    [
        ({"moe_every": 1}, "llama", "model.moe_every=1: .* cannot be written as LlamaForCausalLM"),
        ({"moe_every": 2, "gate": ROUTER}, "mixtral", "model.moe_every=2"),
        ({"moe_every": 1}, "mixtral", "model.gate.name=comet"),
        ({"moe_every": 1, "gate": TopKConfig(k=2)}, "mixtral", "model.gate.bias=True"),
        ({"moe_every": 1, "gate": TopKConfig(bias=False, scores="sigmoid")}, "mixtral", "model.gate.scores=sigmoid"),
        ({"moe_every": 1, "gate": ROUTER, "shared_hidden": 3}, "mixtral", "model.shared_hidden=3"),
        (
            {"moe_every": 1, "gate": ROUTER, "experts": {"name": "dense_relu", "units": 8}},
            "mixtral",
            "model.experts.name=dense_relu: .* cannot be written as Mixtral.*; architectures that .* it: dist_moe",
        ),
        (
            {"moe_every": 1, "gate": ROUTER, "experts": {"activation": "gelu"}},
            "mixtral",
            "model.experts.activation=gelu",
        ),
        ({"moe_every": 1, "gate": ROUTER, "num_slots": 7}, "mixtral", "model.num_slots=7"),
    ],
)
def test_what_an_architecture_has_no_place_for(
    tmp_path: Path, options: dict[str, Any], architecture: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write_decoder(make_transformer(**options), tmp_path / "x", architecture=architecture)
    assert not (tmp_path / "x").exists()


def test_a_model_that_passes_through_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor is read to be opened, nor to find out its precision, which would take a layer's experts each time."""
    read, original = list[str](), StoredTensors.read
    monkeypatch.setattr(StoredTensors, "read", lambda self, name, *row: read.append(name) or original(self, name, *row))
    checkpoint = open_decoder(save_mixtral(tmp_path / "theirs"))
    weights = checkpoint.weights
    assert isinstance(weights, ModelWeights)
    assert not read
    write_decoder_weights(weights, checkpoint.config, checkpoint.vocab_size, tmp_path / "again", like=checkpoint)
    assert sorted(read) == sorted(load_file(tmp_path / "theirs" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["slots that share an expert", "slots that a gate must not choose"])
def test_what_a_router_of_mixtral_cannot_say(tmp_path: Path, kind: str) -> None:
    """Our own architecture can."""
    ours = make_transformer(moe_every=1, gate=ROUTER).eval()
    if kind == "slots that share an expert":
        next(iter(ours.tables.values())).table.copy_(torch.tensor([0, 1, 1, 2]))
    else:
        next(iter(ours.moe_layers.values())).each_gate[0].allow(torch.tensor([True, True, False, True]))
    with pytest.raises(UserError, match=r"MixtralForCausalLM has no place for .* architecture=dist_moe"):
        write_decoder(ours, tmp_path / "x", architecture="mixtral")
    assert not (tmp_path / "x").exists()
    if kind == "slots that share an expert":
        assert write_decoder(ours, tmp_path / "x", architecture="dist_moe") == "dist_moe"
        assert logits(read_into_fresh(tmp_path / "x")[1]).equal(logits(ours))


def test_our_own_checkpoint_without_one_tensor(tmp_path: Path) -> None:
    write_decoder(make_transformer(), tmp_path)
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("slot_map.table")})
    with pytest.raises(UserError, match=r"missing: layers\.1\.moe\.slot_map\.table"):
        read_into_fresh(tmp_path)


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    words = ["<|endoftext|>", "stir", "the", "soup"]
    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    write_decoder(make_transformer(moe_every=0), tmp_path, tokenizer=tokenizer, end_of_text=0, positions=99)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("stir the soup").input_ids == tokenizer.encode("stir the soup").ids == [1, 2, 3]
    assert (theirs.eos_token, theirs.eos_token_id, theirs.model_max_length) == ("<|endoftext|>", 0, 99)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.eos_token_id, config.max_position_embeddings) == (0, 99)


def test_a_gate_that_there_is_not_is_named(tmp_path: Path) -> None:
    write_decoder(make_transformer(), tmp_path)
    mixture = json.loads((tmp_path / "config.json").read_text())["mixture"]
    with pytest.raises(UserError, match=r"cannot be followed: gate\.name='oracle' is not a gate"):
        read_decoder(reconfigure(tmp_path, mixture=mixture | {"gate": {"name": "oracle"}}))


def test_rounded_weights(tmp_path: Path) -> None:
    ours = make_transformer(gate=CometConfig(k=2))
    write_decoder(ours, tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors["model.norm.weight"], ours.norm.weight.bfloat16())
    assert tensors["model.layers.1.mlp.moe.slot_map.table"].dtype == torch.int64
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
