"""A decoder that goes on from a run: a Llama with its own tokenizer, trained further and up-cycled on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_moe.models import RunShape, TransformerConfig
from dist_moe.models.hugging_face.decoder import write_decoder
from dist_moe.parallel import SingleWorld
from tests.data.text.test_own_tokenizer import byte_level
from tests.helpers.commands import run_here, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, tensors_of, write_config
from tests.helpers.texts import write_lm_config

SIZES = {"layers": 2, "dim": 12, "heads": 2, "kv_heads": 1, "dense_hidden": 20}
EXPERTS = [
    "model.moe_every=1",
    "model.experts.hidden=20",
    "model.gate={name: top_k, k: 2, bias: false}",
    "parallel.expert_parallel_size=2",
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers keeps a Llama; its embedding has more rows than its tokenizer has tokens."""
    directory = tmp_path_factory.mktemp("llama") / "tiny"
    tokenizer = byte_level()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    torch.manual_seed(5)
    size = tokenizer.get_vocab_size() + 12
    model = TransformerConfig(moe_every=0, **SIZES).build(size, RunShape(SingleWorld(), 1))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # 0.02 is so small that a tiny model would be linear
    write_decoder(model, directory, tokenizer=tokenizer, end_of_text=tokenizer.token_to_id("<|endoftext|>"))
    return directory


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_text: dict[str, str], llama: Path) -> Path:
    """Of a run that trains the Llama as it is, with its tokenizer."""
    data, model = tiny_text | {"tokenizer": str(llama)}, SIZES | {"moe_every": 0}
    return write_lm_config(tmp_path_factory.mktemp("lm"), data, model=model, train={"max_steps": 3})


@pytest.fixture(scope="module")
def imported(config: Path, llama: Path) -> Path:
    """Step 0 has the Llama's weights."""
    succeed(1, "import", llama, config.parent / "imported", "--config", config)
    return config.parent / "imported"


@pytest.fixture(scope="module")
def dense(imported: Path, config: Path) -> Path:
    """Trained from there."""
    run = config.parent / "dense"
    succeed(1, "train", "--run-dir", run, config, f"start.run={imported}")
    return run


def test_the_imported_model_begins_with_its_own_loss(imported: Path, dense: Path, tmp_path: Path) -> None:
    """Two ways to the same run: resumed from step 0, and started from it."""
    resumed = shutil.copytree(imported, tmp_path / "resumed")
    succeed(1, "train", "--resume", resumed)
    torch.testing.assert_close(losses_of(resumed), losses_of(dense), rtol=0, atol=1e-5)
    assert json.loads((dense / "summary.json").read_text())["test"]["bits_per_byte"] > 0


def test_it_is_up_cycled_on_two_ranks(imported: Path, dense: Path, config: Path, tmp_path: Path) -> None:
    """Copies mixed with weights that sum to 1 are the dense network; then every expert goes its own way."""
    succeed(2, "train", "--run-dir", tmp_path / "run", config, *EXPERTS, f"start.run={imported}")
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 3
    assert float(losses[0]) == pytest.approx(float(losses_of(dense)[0]), abs=1e-5)
    noisy = [f"start.run={imported}", "start.conversion.noise=0.5", "train.max_steps=1"]
    succeed(2, "train", "--run-dir", tmp_path / "noisy", config, *EXPERTS, *noisy)
    assert abs(float(losses_of(tmp_path / "noisy")[0]) - float(losses[0])) > 1e-5


def test_a_run_with_experts_goes_on_as_it_is(imported: Path, config: Path, tmp_path: Path) -> None:
    """All weights, those of gates included, whatever the expert-parallel size."""
    first, second = tmp_path / "first", tmp_path / "second"
    succeed(2, "train", "--run-dir", first, config, *EXPERTS, f"start.run={imported}")
    frozen = ["deepspeed.optimizer.params.lr=0", "train.max_steps=1", "parallel.expert_parallel_size=1"]
    succeed(1, "train", "--run-dir", second, config, *EXPERTS, f"start.run={first}", *frozen)
    before, after = tensors_of(first), tensors_of(second)
    masters = [key for key in before if key.endswith("|master")]
    assert masters
    assert [key for key in masters if not before[key].equal(after[key])] == []
    third = ["train", "--run-dir", tmp_path / "third", config, *EXPERTS, *frozen, f"start.run={first}"]
    message = refusal(*third, "model.num_experts=2")
    assert "has experts, and model.num_experts=4, not 2; take the section model of its config.yaml" in message


def test_the_summary_says_what_a_token_costs(dense: Path, imported: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed(2, "train", "--run-dir", run, config, *EXPERTS, f"start.run={imported}", "train.max_steps=1")
    sparse, alone = (json.loads((path / "summary.json").read_text()) for path in (run, dense))
    expert = 3 * 12 * 20  # a SwiGLU network
    assert sparse["parameters"] - alone["parameters"] == 2 * (3 * expert + 4 * 12)
    assert sparse["active_parameters"] - alone["active_parameters"] == 2 * (expert + 4 * 12)
    assert sparse["flops_per_token"] - alone["flops_per_token"] == 2 * 2 * (expert + 4 * 12)
    assert alone["active_parameters"] == alone["parameters"]


def refusal(*arguments: object) -> str:
    (outcome,) = on_ranks(1, run_here, [str(argument) for argument in arguments])
    assert outcome.code == 2
    return outcome.err


def test_refusals(
    imported: Path, config: Path, llama: Path, tmp_path: Path, tiny_text: dict[str, str], tiny_data: dict[str, str]
) -> None:
    begin = ["train", "--run-dir", tmp_path / "run", config, f"start.run={imported}"]
    assert f"start.run={imported}: model.dim=24, but the dense model has 12" in refusal(*begin, "model.dim=24")
    assert "use model.experts.hidden=20" in refusal(*begin, "model.moe_every=1", "model.experts.hidden=21")
    assert "was trained with other tokens" in refusal(*begin, "data.tokenizer=null")
    for other in ("data.seed=1", "data.held_out=0.3", "data.characters_per_domain=null"):
        field = other.partition("=")[0]
        assert f"was trained with {field}=" in refusal(*begin, other)
    without = write_lm_config(tmp_path / "without", tiny_text, model=SIZES | {"moe_every": 0})
    asked = refusal("import", llama, tmp_path / "x", "--config", without)
    assert f"use data.tokenizer={llama}" in asked
    recommender = write_config(tmp_path / "recommender", tiny_data)
    assert "start: for model.name=bert_classifier or bert_answerer, not recommender" in refusal(
        "train", "--run-dir", tmp_path / "run", recommender, "start={}"
    )
    succeed(1, "train", "--run-dir", tmp_path / "other", recommender, "train.max_steps=1")
    assert f"start.run={tmp_path / 'other'} is a run of model.name=recommender; name one of" in refusal(
        "train", "--run-dir", tmp_path / "run", config, f"start.run={tmp_path / 'other'}"
    )
    assert "start.run: required, but not given" in refusal("train", "--run-dir", tmp_path / "run", config, "start={}")
    assert not (tmp_path / "run").exists()


def test_tokens_without_rows_are_refused(llama: Path, config: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(llama, tmp_path / "llama")
    tokenizer = byte_level()
    rows = tokenizer.get_vocab_size() + 12
    tokenizer.add_tokens([f"word {i}" for i in range(13)])
    tokenizer.save(str(copied / "tokenizer.json"))
    message = refusal("import", copied, tmp_path / "run", "--config", config)
    assert f"tokenizer.json has tokens up to id {rows}, the embedding beside it {rows} rows; take the tokens" in message
    assert not (tmp_path / "run").exists()
