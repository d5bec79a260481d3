"""Odd Hugging Face directories: what is no weight is passed over, what cannot be right is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.gates import CometConfig, GateContext, TopKConfig
from dist_moe.models import RunShape, TransformerConfig
from dist_moe.models.bert import read_hugging_face
from dist_moe.models.hugging_face.decoder import read_decoder, write_decoder
from dist_moe.models.hugging_face.files import INDEX, WEIGHTS
from dist_moe.parallel import SingleWorld
from tests.helpers.berts import dense
from tests.models.hugging_face.directories import reconfigure, rewrite

Tensors = dict[str, Tensor]

SIZES: dict[str, Any] = {"layers": 2, "dim": 8, "heads": 4, "kv_heads": 2, "dense_hidden": 6, "tied_embeddings": False}
EXPERTS: dict[str, Any] = {"num_experts": 3, "experts": {"hidden": 5}}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"moe_every": 0},
    "mixtral": {"moe_every": 1, "gate": TopKConfig(k=2, bias=False), **EXPERTS},
    "dist_moe": {"moe_every": 2, "gate": CometConfig(k=2, gamma=1.0), **EXPERTS},
}
VOCABULARY = 11


def run() -> RunShape:
    return RunShape(SingleWorld(), 10, GateContext(torch.arange(VOCABULARY) + 1, 100))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dist_moe.models.bert import write_hugging_face

    root = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        model = TransformerConfig.model_validate({**SIZES, **fields}).build(VOCABULARY, run())
        write_decoder(model, root / name, architecture=name)  # type: ignore[arg-type]
    write_hugging_face(dense().float(), root / "bert")
    return root


@pytest.fixture
def copy(originals: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(originals / name, tmp_path / name))


def read(directory: Path) -> Any:
    if directory.name == "bert":
        return read_hugging_face(directory)
    checkpoint = read_decoder(directory)
    checkpoint.into(checkpoint.config.build(checkpoint.vocab_size, run()))
    return checkpoint


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as error:
        read(directory)
    assert len(str(error.value)) < 2000
    return str(error.value)


@pytest.mark.parametrize(
    "constant",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.masked_bias",
        "model.position_ids",
    ],
)
def test_constants_beside_weights_are_passed_over(copy: Callable[[str], Path], constant: str) -> None:
    for name in MODELS:
        directory = copy(name)
        plain = read(directory).weights
        weights = read(rewrite(directory, lambda tensors: tensors | {constant: torch.full((2,), torch.nan)})).weights
        assert weights.keys() == plain.keys()
    other = rewrite(directory, lambda tensors: tensors | {"model.layers.0.self_attn.inv_freq.weight": torch.rand(2)})
    assert "unknown: model.layers.0.self_attn.inv_freq.weight" in refusal(other)


SIZE_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "num_local_experts", "num_experts_per_tok"),
)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None, [8], 10**4000, 2**31, float("nan")])
def test_sizes_of_a_wrong_type_or_range_are_named(copy: Callable[[str], Path], value: Any) -> None:
    """Of every field; one whose value the model cannot do without, with its name in the message."""
    directory = copy("mixtral")
    before = (directory / "config.json").read_text()
    for field in SIZE_FIELDS:
        if (field, value) == ("num_key_value_heads", None):
            continue  # transformers' own way to say: as many as heads
        if not isinstance(value, int) or abs(value) < 10**1000:
            reconfigure(directory, **{field: value})
        else:  # Python writes no such number, other programs do
            (directory / "config.json").write_text(before.replace(f'"{field}": ', f'"{field}": 1{"0" * 4000}'))
        message = refusal(directory)
        assert field in message, message
        assert "config.json" in message
        (directory / "config.json").write_text(before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5'; expected a number above 0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf: JSON has finite numbers only"),
        ({"rope_theta": -1, "rope_parameters": None}, "rope_theta=-1; expected"),
        ({"rope_parameters": [1]}, r"rope_parameters=[1]; expected an object"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'; expected an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x'; expected"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false'; expected true or false"),
        ({"num_hidden_layers": 900}, "says 900 layers, and there are"),
        ({"num_hidden_layers": 10_000_000}, "layers"),
        ({"num_local_experts": 900}, "says 900 experts"),
        ({"num_experts_per_tok": 4}, "k=4 exceeds num_experts=3"),
        ({"vocab_size": 12}, "has shape (11, 8), and config.json says (12, 8)"),
        ({"intermediate_size": 4}, "has shape (5, 8), and config.json says (4, 8)"),
        ({"model_type": ["mixtral"]}, "there is no such decoder here"),
    ],
)
def test_fields_that_cannot_be_followed(copy: Callable[[str], Path], fields: dict[str, Any], message: str) -> None:
    found = refusal(reconfigure(copy("mixtral"), **fields))
    assert message in found
    assert "mixtral" in found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 2**31}, "mixture.num_experts=2147483648; expected at most"),
        ({"num_experts": 5}, "says 5 experts"),
        ({"shared_hidden": 10**30}, "mixture.shared_hidden=1000000000"),
        ({"gate": {"name": "comet", "k": 10**9}}, "mixture.gate.k=1000000000; expected at most"),
        ({"gate": 5}, "gate"),
    ],
)
def test_a_section_of_ours_that_cannot_be_followed(
    copy: Callable[[str], Path], fields: dict[str, Any], message: str
) -> None:
    directory = copy("dist_moe")
    section = json.loads((directory / "config.json").read_text())["mixture"]
    assert message in refusal(reconfigure(directory, mixture=section | fields))
    assert "mixture=[]; expected an object" in refusal(reconfigure(directory, mixture=[]))


@pytest.mark.parametrize("model", [*MODELS, "bert"])
def test_values_that_are_no_weights_are_named(copy: Callable[[str], Path], model: str) -> None:
    """One tensor of each kind at a time: not finite, whole numbers, 8 bits, another shape, a scalar."""
    directory = copy(model)
    before = (directory / WEIGHTS).read_bytes()
    names = [name for name, tensor in load_file(directory / WEIGHTS).items() if tensor.is_floating_point()]
    for name in (names[0], names[len(names) // 2], names[-1]):
        for spoil in (
            lambda tensor: tensor * torch.nan,
            lambda tensor: tensor.long(),
            lambda tensor: tensor.to(torch.float8_e4m3fn),
            lambda tensor: torch.stack([tensor, tensor]),
            lambda tensor: torch.tensor(1.0),
        ):
            rewrite(directory, lambda tensors, name=name, spoil=spoil: tensors | {name: spoil(tensors[name])})
            message = refusal(directory).replace(" layers.1.moe.", " model.layers.1.mlp.moe.")
            assert name.removeprefix("bert.") in message
            (directory / WEIGHTS).write_bytes(before)
    read(directory)


def test_a_table_that_names_experts_that_there_are_not(copy: Callable[[str], Path]) -> None:
    def moved(tensors: Tensors) -> Tensors:
        return {name: t + 1 if name.endswith("slot_map.table") else t for name, t in tensors.items()}

    assert "slot_map.table holds numbers outside of 0..2" in refusal(rewrite(copy("dist_moe"), moved))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, 0) for field in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")),
        *(("hidden_size", value) for value in ("12", 12.0, None, True, -12, 10**30)),
        *(("layer_norm_eps", value) for value in (0, "x", float("nan"), None)),
        *(("max_position_embeddings", value) for value in (9, 2**40)),
        ("num_hidden_layers", 100_000),
        ("hidden_act", {}),
    ],
)
def test_sizes_of_an_encoder(copy: Callable[[str], Path], field: str, value: Any) -> None:
    message = refusal(reconfigure(copy("bert"), **{field: value}))
    assert field in message or "config.json says" in message


def sharded(directory: Path, file_of: Callable[[str], str] = lambda name: "a.safetensors") -> dict[str, str]:
    """Move the weights into two files, and write the index that ``file_of`` changes."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    places = {name: "ab"[number % 2] + ".safetensors" for number, name in enumerate(sorted(tensors))}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    return places


@pytest.mark.parametrize("place", ["../a.safetensors", "/etc/passwd", "", ".", "x/../../a.safetensors", 5, None, ["a"]])
def test_an_index_that_points_elsewhere(copy: Callable[[str], Path], place: Any) -> None:
    directory = copy("llama")
    places: dict[str, Any] = dict(sharded(directory))
    read(directory)
    places[min(places)] = place
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    assert INDEX in refusal(directory)


def test_a_tensor_in_two_files_is_not_the_last_one_that_is_read(copy: Callable[[str], Path]) -> None:
    directory = copy("llama")
    places = sharded(directory)
    name = min(places)
    other = load_file(directory / "b.safetensors")
    save_file(other | {name: load_file(directory / "a.safetensors")[name] + 1}, directory / "b.safetensors")
    assert f"do not agree on {name}" in refusal(directory)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "a.safetensors"])
def test_pipes_are_not_waited_for(copy: Callable[[str], Path], name: str) -> None:
    directory = copy("llama")
    if name == "a.safetensors":
        sharded(directory)
    (directory / name).unlink()
    os.mkfifo(directory / name)
    assert name in refusal(directory)


def test_one_parameter_under_two_names(copy: Callable[[str], Path]) -> None:
    def twice(tensors: Tensors) -> Tensors:
        name = "bert.embeddings.LayerNorm.weight"
        return tensors | {name.replace("weight", "gamma"): tensors[name] + 1}

    assert "embeddings.LayerNorm.weight twice" in refusal(rewrite(copy("bert"), twice))
