"""dist-moe compress DIR: directories of mixtures, as people have them, with fewer experts."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from dist_moe.data.batches import spread_over
from dist_moe.engine.checkpoint import newest_checkpoint, place_weights, read_model
from dist_moe.models import RunShape, Transformer, layer_stream
from dist_moe.models.hugging_face.decoder import read_decoder
from dist_moe.models.hugging_face.files import StoredTensors
from dist_moe.models.transformer import DecoderLayer
from dist_moe.parallel import SingleWorld
from dist_moe.recipes import load_config
from dist_moe.recipes.merge_compress import CompressConfig, Compression, compress_directory
from dist_moe.tasks import build_model
from dist_moe.tasks.language import LanguageModelSettings
from tests.data.text.test_own_tokenizer import byte_level
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.texts import write_lm_config
from tests.models.hugging_face.directories import reconfigure

transformers = pytest.importorskip("transformers")

EXPERTS, LAYERS, HIDDEN = 6, 3, 8
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": HIDDEN, "num_local_experts": EXPERTS}),
    "olmoe": ("Olmoe", {"intermediate_size": HIDDEN, "num_experts": EXPERTS, "norm_topk_prob": False}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"moe_intermediate_size": HIDDEN, "num_experts": EXPERTS, "shared_expert_intermediate_size": 8},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"moe_intermediate_size": HIDDEN, "num_experts": EXPERTS, "head_dim": 6, "norm_topk_prob": True},
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each family: random weights, large enough that routers decide, and a tokenizer."""
    root = tmp_path_factory.mktemp("sources")
    tokenizer = byte_level()
    for family, (name, fields) in FAMILIES.items():
        torch.manual_seed(0)
        sizes = (
            SIZES
            | fields
            | {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": tokenizer.token_to_id("<|endoftext|>")}
        )
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.mul_(1 if "norm" in parameter_name else 8)
        model.save_pretrained(root / family)
        tokenizer.save(str(root / family / "tokenizer.json"))
    return root


def compress(source: Path, output: Path, text: dict[str, str], *arguments: object) -> dict[str, Any]:
    data = [f"data.{name}={value}" for name, value in text.items()]
    succeed(1, "compress", source, output, *data, "data.sequence_length=16", "data.held_out=0.2", *arguments)
    report: dict[str, Any] = json.loads((output / "compress.json").read_text())
    return report


def held_out(source: Path, text: dict[str, str], report: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens and the tokens that follow, as the command takes them."""
    content = {"name": "text", "tokenizer": source, "sequence_length": 16, "held_out": 0.2, **text}
    task = LanguageModelSettings.model_validate(content).open(progress=False)
    rows = spread_over(len(task.test), report["compress"]["examples"])
    batch = task.test.batch(rows, rows)
    assert batch.token_BS.numel() == report["held_out"]["tokens"] > 300
    return batch.token_BS, batch.target_BS


def load(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=True
    ).eval()


@torch.no_grad()
def logits_of(model: Any, token_BS: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=token_BS).logits
    return logits


def loss_of(logits_BSV: Tensor, target_BS: Tensor) -> float:
    return float(F.cross_entropy(logits_BSV.flatten(0, 1).double(), target_BS.flatten()))


@torch.no_grad()
def our_logits(directory: Path, token_BS: Tensor) -> Tensor:
    checkpoint = read_decoder(directory)
    model: Transformer = checkpoint.config.build(checkpoint.vocab_size, RunShape(SingleWorld(), 1)).eval()
    checkpoint.into(model)
    return torch.as_tensor(model(token_BS).predictions[0])


def experts_of(directory: Path, layer: int) -> list[dict[str, Tensor]]:
    """Each expert's matrices, (in, out), of a stock directory."""
    tensors = load_file(directory / "model.safetensors")
    names = {"gate": ("w1", "gate_proj"), "up": ("w3", "up_proj"), "down": ("w2", "down_proj")}
    found = []
    for expert in range(EXPERTS):
        of_expert = {n: t for n, t in tensors.items() if f"layers.{layer}." in n and f".experts.{expert}." in n}
        found.append(
            {
                ours: next(t for n, t in of_expert.items() if n.endswith(tuple(f"{x}.weight" for x in theirs))).T
                for ours, theirs in names.items()
            }
        )
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_merged_experts_in_our_architecture(
    sources: Path, tmp_path: Path, tiny_text: dict[str, str], family: str
) -> None:
    """Means weighted by usage, seen through slot maps; transformers computes what our model does."""
    source, output = sources / family, tmp_path / "out"
    report = compress(source, output, tiny_text, "--experts", 3, "align=none", "examples=40")
    assert report["form"] == "dist_moe"
    assert sum(len(layer["groups"]) for layer in report["layers"]) == 3 * LAYERS
    written = load_file(output / "model.safetensors")
    assert report["parameters_after"] == sum(t.numel() for t in written.values() if t.is_floating_point())
    for number, layer in enumerate(report["layers"]):
        experts, block = experts_of(source, number), f"model.layers.{number}.mlp.moe"
        table_S = written[f"{block}.slot_map.table"].flatten()
        for new, group in enumerate(layer["groups"]):
            assert table_S[group].tolist() == [new] * len(group)
            share = torch.tensor([layer["usage"][e] for e in group], dtype=torch.float64)
            share = share / share.sum() if share.sum() else torch.full_like(share, 1 / len(group))
            for name in ("gate", "up", "down"):
                mean = sum(s * experts[e][name].double() for s, e in zip(share, group, strict=True))
                stored = written[f"{block}.experts.{name}"][new]
                torch.testing.assert_close(stored, torch.as_tensor(mean).float(), rtol=1e-6, atol=1e-6)
    token_BS, target_BS = held_out(source, tiny_text, report)
    found = logits_of(load(output), token_BS)
    torch.testing.assert_close(found, our_logits(output, token_BS), rtol=1e-5, atol=1e-5 * float(found.abs().max()))
    before = loss_of(logits_of(load(source), token_BS), target_BS)
    assert report["held_out"]["loss_before"] == pytest.approx(before, abs=1e-5)
    assert report["held_out"]["loss_after"] == pytest.approx(loss_of(found, target_BS), abs=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert (
        tokenizer("stir the soup").input_ids
        == transformers.AutoTokenizer.from_pretrained(source)("stir the soup").input_ids
    )


def usage_of(model: Any, token_BS: Tensor) -> list[Tensor]:
    """Share of the assignments of each expert, by layer, from the indices that transformers' routers give."""
    found: list[Tensor] = []

    def see(gate: Any, inputs: Any, output: Any) -> None:
        found.append(output[2].flatten().bincount(minlength=EXPERTS))

    hooks = [layer.mlp.gate.register_forward_hook(see) for layer in model.model.layers]
    logits_of(model, token_BS)
    for hook in hooks:
        hook.remove()
    return [count.double() / count.sum() for count in found]


def mask_routers(model: Any, kept: list[list[int]]) -> None:
    """Let routers choose among ``kept`` experts as if there were no more, as their probabilities are computed."""
    for layer, of_layer in zip(model.model.layers, kept, strict=True):
        gate = layer.mlp.gate

        def forward(x: Tensor, gate: Any = gate, of_layer: list[int] = of_layer) -> tuple[Tensor, Tensor, Tensor]:
            logits = F.linear(x.reshape(-1, x.shape[-1]), gate.weight)
            masked = torch.full_like(logits, -torch.inf).index_copy(1, torch.tensor(of_layer), logits[:, of_layer])
            weight, index = masked.softmax(-1).topk(min(gate.top_k, len(of_layer)), -1)
            renormalised = getattr(gate, "norm_topk_prob", True)
            return logits, weight / weight.sum(-1, keepdim=True) if renormalised else weight, index

        gate.forward = forward


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experts", [4, 2])
def test_pruned_stock_models_are_exact(
    sources: Path, tmp_path: Path, tiny_text: dict[str, str], family: str, experts: int
) -> None:
    """Against transformers' own model with masked routers; with 2 experts left, tokens have 2 instead of 3."""
    source, output = sources / family, tmp_path / "out"
    report = compress(source, output, tiny_text, "--experts", experts, "--method", "prune_usage", "examples=40")
    assert report["form"] == "stock"
    assert report["folding"] is None
    kept, naive = [layer["leaders"] for layer in report["layers"]], load(source)
    assert [len(of_layer) for of_layer in kept] == [experts] * LAYERS
    token_BS, target_BS = held_out(source, tiny_text, report)
    before = logits_of(naive, token_BS)
    mask_routers(naive, kept)
    expected, stock = logits_of(naive, token_BS), load(output)
    assert type(stock).__name__ == f"{FAMILIES[family][0]}ForCausalLM"
    torch.testing.assert_close(logits_of(stock, token_BS), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert report["held_out"]["loss_before"] == pytest.approx(loss_of(before, target_BS), abs=1e-5)
    assert report["held_out"]["loss_after"] == pytest.approx(loss_of(expected, target_BS), abs=1e-5)
    originals, found = load_file(source / "model.safetensors"), load_file(output / "model.safetensors")
    for number, of_layer in enumerate(kept):
        router = next(n for n in found if n.startswith(f"model.layers.{number}.") and n.endswith(".gate.weight"))
        assert found[router].equal(originals[router][of_layer])
        block = router.removesuffix("gate.weight")
        for new, old in enumerate(of_layer):
            of_expert = [n for n in found if n.startswith(f"{block}experts.{new}.")]
            assert len(of_expert) == 3
            assert all(found[n].equal(originals[n.replace(f"experts.{new}.", f"experts.{old}.")]) for n in of_expert)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_the_error_of_a_folded_router_is_the_one_that_is_reported(
    sources: Path, tmp_path: Path, tiny_text: dict[str, str], family: str
) -> None:
    """And fitted rows are better than the means from which they start."""
    source, options = sources / family, ["--experts", 4, "--grouping", "uniform", "examples=40"]
    report = compress(source, tmp_path / "stock", tiny_text, *options, "--as", "stock")
    maps = compress(source, tmp_path / "maps", tiny_text, *options, "--as", "dist_moe")
    assert maps["layers"] == report["layers"]
    token_BS, target_BS = held_out(source, tiny_text, report)
    exact, folded = (logits_of(load(tmp_path / name), token_BS) for name in ("maps", "stock"))
    log_exact, log_folded = exact.double().log_softmax(-1), folded.double().log_softmax(-1)
    expected = {
        "loss_before": loss_of(exact, target_BS),
        "loss_after": loss_of(folded, target_BS),
        "divergence": float((log_exact.exp() * (log_exact - log_folded)).sum(-1).mean()),
        "mean_difference": float((exact - folded).abs().mean()),
        "largest_difference": float((exact - folded).abs().max()),
    }
    assert expected["divergence"] > 1e-4, "a router cannot say it exactly"
    for name, value in expected.items():
        assert report["folding"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert report["held_out"]["loss_after"] == pytest.approx(expected["loss_after"], abs=1e-5)
    assert maps["held_out"]["loss_after"] == pytest.approx(expected["loss_before"], abs=1e-5)


def test_usage_is_that_of_transformers(sources: Path, tmp_path: Path, tiny_text: dict[str, str]) -> None:
    """Calibrated layer by layer; the part to calibrate on is the one asked for."""
    source = sources / "qwen3_moe"
    report = compress(
        source,
        tmp_path / "out",
        tiny_text,
        "--experts",
        3,
        "part=val",
        "examples=1000",
        "--as",
        "stock",
        "--grouping",
        "uniform",
    )
    content = {"name": "text", "tokenizer": source, "sequence_length": 16, "held_out": 0.2, **tiny_text}
    part = LanguageModelSettings.model_validate(content).open(progress=False).val
    rows = spread_over(len(part), 1000)
    for layer, usage_E in zip(report["layers"], usage_of(load(source), part.batch(rows, rows).token_BS), strict=True):
        assert layer["usage"] == pytest.approx(usage_E.tolist(), abs=1e-3)
        assert layer["tokens"] == len(part) * 16


def test_a_run_of_ours_with_slot_maps(sources: Path, tmp_path: Path, tiny_text: dict[str, str]) -> None:
    """It evaluates to what the report says, trains on, and has the weights of the directory."""
    source, options = sources / "mixtral", ["--experts", 3, "examples=10000"]
    config = write_lm_config(tmp_path, tiny_text | {"tokenizer": str(source)}, train={"max_steps": 2})
    report = compress(source, tmp_path / "run", {}, *options, "--as", "run", "--config", config)
    directory = compress(source, tmp_path / "maps", tiny_text, *options)
    assert report["layers"] == directory["layers"]
    found = json.loads(succeed(1, "evaluate", tmp_path / "run", "--json")[0].out)["test"]["loss"]
    task = read_decoder(tmp_path / "maps")
    assert found == pytest.approx(report["held_out"]["loss_after"], abs=1e-4), "all of the same text"
    run, maps = read_model(newest_checkpoint(tmp_path / "run")), task.weights
    assert run.keys() == maps.keys()
    assert all(run[name].equal(maps[name]) for name in maps)
    succeed(1, "train", "--resume", tmp_path / "run", "train.max_steps=1", "train.validate_every=1")


def test_a_compressed_directory_is_compressed_again(sources: Path, tmp_path: Path, tiny_text: dict[str, str]) -> None:
    """In bf16, which it keeps; slots are led on through both maps, and masks stay."""
    half = transformers.AutoModelForCausalLM.from_pretrained(sources / "qwen2_moe", dtype=torch.bfloat16)
    shutil.copytree(sources / "qwen2_moe", tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    half.save_pretrained(tmp_path / "half")
    compress(tmp_path / "half", tmp_path / "first", tiny_text, "--experts", 4, "examples=40")
    report = compress(tmp_path / "first", tmp_path / "second", tiny_text, "--experts", 2, "--method", "reap")
    assert report["form"] == "dist_moe"
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert {t.dtype for t in second.values()} == {torch.bfloat16, torch.int64, torch.bool}
    for number, layer in enumerate(report["layers"]):
        block = f"model.layers.{number}.mlp.moe"
        kept_S = torch.isin(first[f"{block}.slot_map.table"].flatten(), torch.tensor(layer["leaders"]))
        assert second[f"{block}.gates.0.allowed_E"].equal(kept_S)
        for new, old in enumerate(layer["leaders"]):
            assert second[f"{block}.experts.up"][new].equal(first[f"{block}.experts.up"][old])
    token_BS, target_BS = held_out(tmp_path / "second", tiny_text, report)
    logits_BSV = logits_of(load(tmp_path / "second"), token_BS)
    assert report["held_out"]["loss_after"] == pytest.approx(loss_of(logits_BSV, target_BS), abs=1e-5)
    (outcome,) = dist_moe(1, "compress", tmp_path / "first", tmp_path / "no", "--experts", 2, "--as", "stock")
    assert outcome.code == 2
    assert "no stock one to write" in outcome.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_text: dict[str, str]) -> Path:
    """A run that any stock architecture but OLMoE's and Qwen's has a place for."""
    root = tmp_path_factory.mktemp("trained")
    gate = {"name": "top_k", "k": 2, "bias": False}
    model = {"num_experts": 8, "moe_every": 1, "experts": {"hidden": 8}, "gate": gate}
    config = write_lm_config(root, tiny_text, model=model, train={"max_steps": 20})
    succeed(1, "train", config, "--run-dir", root / "run")
    return root / "run"


@pytest.mark.parametrize("method", ["m_smoe", "prune_usage"])
@pytest.mark.parametrize("grouping", ["global", "uniform"])
def test_a_compressed_run_is_exported(trained: Path, tmp_path: Path, method: str, grouping: str) -> None:
    """With slot maps, masks and layers of different numbers of experts in our architecture; equal ones in Mixtral's."""
    compressed = tmp_path / "run"
    succeed(1, "compress", trained, compressed, "--experts", 4, "--method", method, "--grouping", grouping)
    config = load_config(compressed / "config.yaml")
    assert (config.model.experts_by_layer is not None) == (grouping == "global")
    task = config.data.open(progress=False)
    ours = build_model(config, task, SingleWorld()).eval()
    place_weights(ours, read_model(newest_checkpoint(compressed)))
    token_BS = task.test.batch(*[np.arange(20)] * 2).token_BS
    with torch.no_grad():
        expected = ours(token_BS).predictions[0]
    succeed(1, "export", compressed, "--hf", tmp_path / "maps")
    assert json.loads((tmp_path / "maps/config.json").read_text())["model_type"] == "dist_moe"
    torch.testing.assert_close(logits_of(load(tmp_path / "maps"), token_BS), expected, rtol=1e-5, atol=1e-5)
    (outcome,) = dist_moe(1, "export", compressed, "--hf", tmp_path / "stock", "--architecture", "mixtral")
    if grouping == "global":
        assert outcome.code == 2
        assert "equally many experts" in outcome.err
        return
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("MixtralForCausalLM of ")
    assert ("slot maps folded into the routers" in outcome.out) == (method == "m_smoe")
    stock = logits_of(load(tmp_path / "stock"), token_BS)
    if method == "prune_usage":
        torch.testing.assert_close(stock, expected, rtol=1e-5, atol=1e-5)
    else:
        assert 0 < (stock - expected).abs().max() < 0.5 * expected.abs().max()


def test_one_layer_is_in_memory_at_a_time(
    sources: Path, tmp_path: Path, tiny_text: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all passes over the model; and nothing that is read is larger than an expert or than the embedding."""
    alive: weakref.WeakSet[DecoderLayer] = weakref.WeakSet()
    most, read = [], []

    class Counted(DecoderLayer):
        def __init__(self, *arguments: Any) -> None:
            most.append(len(alive))
            super().__init__(*arguments)
            alive.add(self)

    def reading(self: StoredTensors, name: str, row: int | None = None) -> Tensor:
        read.append((name, tensor := original(self, name, row)))
        return tensor

    original = StoredTensors.read
    monkeypatch.setattr(layer_stream, "DecoderLayer", Counted)
    monkeypatch.setattr(StoredTensors, "read", lambda *args: reading(*args))
    data = [f"data.{name}={value}" for name, value in tiny_text.items()]
    config = CompressConfig(experts=3, examples=40, grouping="uniform", similarity="outputs")
    job = Compression(sources / "mixtral", tmp_path / "out", "stock", None, [*data, "data.sequence_length=16"])
    compress_directory(job, config)
    assert len(most) == LAYERS * 6  # calibrated, folded, compared twice with two models each
    assert max(most) == 0, "the one before is gone when a layer is built"
    assert max(t.numel() for name, t in read if ".experts." in name) == 16 * HIDDEN


GIVEN = [[[0, 5], [1, 2, 3, 4]], [[e] for e in range(EXPERTS)], [[3, 1, 4], [2, 0, 5]]]
"""Groups of each layer; those of the second one are single experts."""


def test_groups_that_are_given(sources: Path, tmp_path: Path, tiny_text: dict[str, str]) -> None:
    """Each layer keeps as many experts as it has groups, those alone to the bit; the picture shows them."""
    source, output = sources / "mixtral", tmp_path / "out"
    report = compress(source, output, tiny_text, f"groups={GIVEN}", "examples=8")
    groups = [sorted(map(sorted, layer["groups"])) for layer in report["layers"]]
    assert groups == [sorted(map(sorted, of_layer)) for of_layer in GIVEN]
    written = load_file(output / "model.safetensors")
    assert [written[f"model.layers.{i}.mlp.moe.experts.up"].shape[0] for i in range(LAYERS)] == [2, EXPERTS, 2]
    for expert, matrices in enumerate(experts_of(source, 1)):
        assert written["model.layers.1.mlp.moe.experts.up"][expert].equal(matrices["up"])
    assert (output / "merged_experts.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--experts", 7, "--grouping", "uniform"], ["experts=7", "has 6"]),
        (["--experts", 3, "--as", "stock", "--grouping", "global"], ["as many experts", "grouping=uniform"]),
        (["--experts", 3, "--as", "stock", "excluded_layers=[0]"], ["as many experts"]),
        (["--experts", 3, "--as", "run"], ["--as run needs --config"]),
        (["--experts", 3, "experts=2"], ["--experts 3 and experts=2"]),
        (["--experts", 3, "similarty=weights"], ["did you mean similarity?"]),
        (["groups=[[[0, 1, 2, 3, 4, 5]]]"], ["groups", "of 1 layers", "has 3"]),
        ([f"groups={GIVEN}", "--as", "stock"], ["as many groups"]),
        (["--experts", 3, "model.dim=4"], ["model.dim", "data.FIELD"]),
        (["--experts", 3, "data.tokenizer=null"], ["vocabulary of"]),
    ],
)
def test_refusals(
    sources: Path, tmp_path: Path, tiny_text: dict[str, str], arguments: list[object], parts: list[str]
) -> None:
    data = [f"data.{name}={value}" for name, value in tiny_text.items()]
    (outcome,) = dist_moe(1, "compress", sources / "mixtral", tmp_path / "out", *data, *arguments)
    assert outcome.code == 2
    assert all(part in outcome.err for part in parts), outcome.err
    assert not (tmp_path / "out").exists()


def test_other_directories_are_refused(sources: Path, tmp_path: Path, tiny_text: dict[str, str]) -> None:
    """A dense model, an unknown family, an output that is there, a run that is asked to be a directory."""
    config = transformers.LlamaConfig(**SIZES, vocab_size=11, intermediate_size=8)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    (dense,) = dist_moe(1, "compress", tmp_path / "dense", tmp_path / "out", "--experts", 2)
    assert "has no experts" in dense.err
    reconfigure(tmp_path / "dense", model_type="gpt2")
    (unknown,) = dist_moe(1, "compress", tmp_path / "dense", tmp_path / "out", "--experts", 2)
    assert "known: llama, mixtral, olmoe, qwen2_moe, qwen3_moe, dist_moe" in unknown.err
    (used,) = dist_moe(1, "compress", sources / "mixtral", sources / "olmoe", "--experts", 2)
    assert "holds a model already" in used.err
    (none,) = dist_moe(1, "compress", tmp_path, tmp_path / "out", "--experts", 2, "--as", "stock")
    assert "go with a Hugging Face directory" in none.err
    assert {dense.code, unknown.code, used.code, none.code} == {2}
