"""Our architecture inside of transformers: any gate, the same logits, generation, training, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.gates import CometConfig, HashRoutingConfig, TopKConfig
from dist_moe.models.hugging_face.decoder import write_decoder
from dist_moe.search import PermutationSearchConfig
from tests.helpers.transformers import EACH_GATE, make_transformer, random_tokens
from tests.models.hugging_face.directories import logits_elsewhere

transformers = pytest.importorskip("transformers")

OPTIONS: dict[str, dict[str, Any]] = {
    "ada_moe": {"moe_every": 1},
    "comet": {"layers": 3},
    "hash": {"tied_embeddings": False},
    "softmax": {"kv_heads": None},
    "top_k": {"gate": TopKConfig(k=2, bias_update_rate=0.1), "shared_hidden": 3},
}
GATES = {name: {"gate": gate} | OPTIONS.get(name, {}) for name, gate in EACH_GATE.items()}
MODELS: dict[str, dict[str, Any]] = {
    "keys normalised": {"gate": CometConfig(k=2), "qk_norm": "all"},
    "heads normalised, wide": {"gate": CometConfig(k=2), "qk_norm": "head", "head_dim": 6, "qkv_bias": True},
    "shared gate": {"gate": TopKConfig(k=2), "qkv_bias": True, "shared_hidden": 3, "shared_gate": True},
    "merged": {"gate": TopKConfig(k=2), "moe_every": 1, "experts_by_layer": (3, 1), "slot_masks": True},
}


def load(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()


def test_a_process_that_knows_nothing_of_ours_loads_comet_and_has_the_same_logits(tmp_path: Path) -> None:
    """Branches have tables of their own, in the midst of learning them; transformers saves the model on the way."""
    search = PermutationSearchConfig(epochs=2, per_branch=True)
    ours, token_BS = make_transformer(gate=CometConfig(k=2, gamma=1.0), permutation=search), random_tokens(3, 9)
    for step in range(3):
        ours.begin_step(step)
        ours(random_tokens(4, 9))
    write_decoder(ours.eval(), tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    found = logits_elsewhere("AutoModelForCausalLM", tmp_path / "second", {"input_ids": token_BS})
    torch.testing.assert_close(found, ours(token_BS).predictions[0], rtol=1e-5, atol=1e-5)
    code = [(tmp_path / name / "modeling_dist_moe.py").read_text() for name in ("first", "second")]
    assert code[0] == code[1]
    (table,) = ours.tables.values()
    assert not torch.equal(table.table, torch.arange(4).expand_as(table.table))


@pytest.mark.parametrize("case", [*GATES, *MODELS])
def test_same_logits_and_weights_under_any_gate(tmp_path: Path, case: str) -> None:
    ours, token_BS = make_transformer(**(GATES | MODELS)[case]).eval(), random_tokens(3, 9)
    write_decoder(ours, tmp_path, total_steps=10)
    theirs = load(tmp_path)
    assert len(theirs.blocks) == len(ours.moe_layers)
    with torch.no_grad():
        output = ours(token_BS)
        torch.testing.assert_close(theirs(input_ids=token_BS).logits, output.predictions[0], rtol=1e-5, atol=1e-5)
    loads = [mixture.pairs.rows_per_expert_E.tolist() for mixture in theirs.mixtures]
    assert loads == [layer.pairs.rows_per_expert_E.tolist() for layer in output.layers]
    for block, layer in zip(theirs.blocks, ours.moe_layers.values(), strict=True):
        for name, buffer in layer.named_buffers():  # those that no checkpoint has, too
            assert torch.equal(block.moe.get_buffer(name), buffer), name
        for name, parameter in layer.named_parameters():
            assert torch.equal(block.moe.get_parameter(name), parameter), name


def test_a_fresh_model_draws_another_hash_table_in_every_layer(tmp_path: Path) -> None:
    write_decoder(make_transformer(gate=HashRoutingConfig(), moe_every=1), tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    fresh = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    one, other, *_ = (dict(block.moe.gates[0].named_buffers()) for block in fresh.blocks)
    assert one.keys() == other.keys()
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("case", ["comet", "hash"])
def test_generation_with_a_cache_is_ours_without(tmp_path: Path, case: str) -> None:
    """Hash routing sees the tokens of each step, padding on the left is masked: both are transformers' own doing."""
    ours, token_BS = make_transformer(**GATES[case]).eval(), random_tokens(2, 5)
    write_decoder(ours, tmp_path)
    theirs = load(tmp_path)
    written = theirs.generate(token_BS, max_new_tokens=6, do_sample=False)
    expected = token_BS
    with torch.no_grad():
        for _ in range(6):
            following = ours(expected).predictions[0][:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], dim=1)
        assert torch.equal(written, expected)
        padded_BS = torch.cat([torch.zeros(2, 3, dtype=torch.int64), token_BS], dim=1)
        mask_BS = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(token_BS)], dim=1)
        last = theirs(input_ids=padded_BS, attention_mask=mask_BS, position_ids=(mask_BS.cumsum(1) - 1).clamp(0))
        torch.testing.assert_close(last.logits[:, -1], ours(token_BS).predictions[0][:, -1], rtol=1e-5, atol=1e-5)


def test_training_counts_the_losses_of_the_gates(tmp_path: Path) -> None:
    gate = TopKConfig(k=2, balance_weight=0.5)
    ours, token_BS = make_transformer(gate=gate, moe_every=1), random_tokens(3, 9)
    write_decoder(ours, tmp_path)
    theirs = load(tmp_path)
    evaluated = theirs(input_ids=token_BS, labels=token_BS).loss
    theirs.train()
    trained = theirs(input_ids=token_BS, labels=token_BS).loss
    torch.testing.assert_close(trained - evaluated, sum(ours(token_BS).aux.values()))
    trained.backward()
    assert all(block.moe.gates[0].weight.grad.any() for block in theirs.blocks)


def test_importing_what_trains_imports_nothing_slow_that_a_run_may_not_need() -> None:
    slow = {"matplotlib", "scipy", "torch._dynamo", "torch.distributed.fsdp", "transformers"}
    code = f"import sys, dist_moe.cli.main, dist_moe.recipes; assert not (found := {slow} & sys.modules.keys()), found"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=500)
