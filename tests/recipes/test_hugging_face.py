"""dist-moe export --hf and import DIR: the same bytes from any layout, and runs that start from a directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_moe.engine.checkpoint import place_weights, read_model
from dist_moe.engine.checkpoint.files import checkpoints_of, newest_checkpoint
from dist_moe.engine.checkpoint.loading import load_checkpoint
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.process_groups import process_groups
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.recipe import load_config, plan_resumed_run
from dist_moe.tasks import build_model
from tests.helpers.commands import run_here, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import losses_of, save_checkpoint, tensors_of
from tests.helpers.texts import write_lm_config

transformers = pytest.importorskip("transformers")

TOP_K = {"name": "top_k", "k": 2, "bias": False}
STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_text: dict[str, str]) -> Path:
    return write_lm_config(tmp_path_factory.mktemp("lm"), tiny_text, train={"max_steps": STEPS})


@pytest.fixture(scope="module")
def sharded(config: Path) -> Path:
    """COMET+, trained with its experts on two ranks."""
    run = config.parent / "sharded"
    succeed(2, "train", "--run-dir", run, config, "parallel.expert_parallel_size=2", "model.permutation.epochs=0.1")
    return run


@pytest.fixture(scope="module")
def exported(sharded: Path) -> Path:
    succeed(1, "export", sharded, "--hf", sharded.parent / "exported")
    return sharded.parent / "exported"


@pytest.fixture(scope="module")
def dense(config: Path) -> Path:
    run, directory = config.parent / "dense", config.parent / "llama"
    succeed(1, "train", "--run-dir", run, config, "model.moe_every=0")
    (said,) = succeed(1, "export", run, "--hf", directory)
    assert said.out.startswith("LlamaForCausalLM of ")
    return directory


def written_by_one_process(source: Path, target: Path) -> None:
    """The newest checkpoint of ``source`` again, as one process writes it."""
    plan = plan_resumed_run(source, ["parallel.expert_parallel_size=1"])
    with process_groups(plan.start.environment, plan.config.parallel) as groups:
        engine = ExpertParallelEngine(build_model(plan.config, plan.task, groups.world), plan.deepspeed, groups)
        assert plan.checkpoint is not None
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoints"))
        save_checkpoint(engine, checkpoints_of(target), load_checkpoint(engine, plan.checkpoint).step, keep=1)
        engine.destroy()


def test_a_sharded_checkpoint_exports_to_the_same_bytes(sharded: Path, exported: Path, tmp_path: Path) -> None:
    on_ranks(1, written_by_one_process, sharded, tmp_path / "whole")
    assert len(list(newest_checkpoint(sharded).glob("experts-*"))) == 2
    assert len(list(newest_checkpoint(tmp_path / "whole").glob("experts-*"))) == 1
    succeed(1, "export", tmp_path / "whole", "--hf", tmp_path / "exported")
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "modeling_dist_moe.py", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1, "all are as readable"
    for name in names:
        assert (exported / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name


def test_an_exported_run_has_its_weights_logits_and_tokens(sharded: Path, exported: Path) -> None:
    """All masters of the checkpoint, by number and value; the logits of the run's own model."""
    masters = [tensor for key, tensor in tensors_of(sharded).items() if "|master" in key]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()
    assert sum(p.numel() for p in theirs.parameters()) == sum(tensor.numel() for tensor in masters)
    expected = tensors_of(sharded)["layers.0.attention.key.weight|master"]
    assert torch.equal(theirs.model.layers[0].self_attn.k_proj.weight, expected)
    config = load_config(sharded / "config.yaml")
    task = config.data.open(progress=False)
    ours = build_model(config, task, SingleWorld()).eval()
    place_weights(ours, read_model(newest_checkpoint(sharded)))
    batch = task.val.batch(*[torch.arange(2).numpy()] * 2)
    with torch.no_grad():
        ours.begin_evaluation()
        torch.testing.assert_close(
            theirs(input_ids=batch.token_BS).logits, ours(batch.token_BS).predictions[0], rtol=1e-5, atol=1e-5
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer("stir the soup").input_ids) == "stir the soup"
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == 0


def test_a_run_comes_back_from_its_directory(sharded: Path, exported: Path, config: Path, tmp_path: Path) -> None:
    succeed(1, "import", exported, tmp_path / "run", "--config", config)
    before, after = tensors_of(sharded), tensors_of(tmp_path / "run")
    kept = {key for key in before if key.split("|")[1] in ("master", "buffer")}
    assert after.keys() == kept
    assert [key for key in kept if not after[key].equal(before[key])] == []
    succeed(1, "export", tmp_path / "run", "--hf", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_a_dense_run_is_up_cycled_and_trained_on_two_ranks(dense: Path, config: Path, tmp_path: Path) -> None:
    """Copies without noise begin with the loss of the dense model; a split has narrower experts."""
    top_k = [f"model.gate={json.dumps(TOP_K)}", "model.moe_every=1"]
    (said,) = succeed(1, "import", dense, tmp_path / "copies", "--config", config, *top_k)
    assert "4 experts in each of 4 layer(s)" in said.out
    dense_loss = json.loads(succeed(1, "evaluate", config.parent / "dense", "--json")[0].out)["test"]["loss"]
    loss = json.loads(succeed(1, "evaluate", tmp_path / "copies", "--json")[0].out)["test"]["loss"]
    assert loss == pytest.approx(dense_loss, abs=1e-5)
    succeed(2, "train", "--resume", tmp_path / "copies", "parallel.expert_parallel_size=2")
    assert len(losses_of(tmp_path / "copies")) == STEPS
    succeed(1, "import", dense, tmp_path / "split", "--config", config, "--experts", "split", *top_k)
    assert load_config(tmp_path / "split/config.yaml").model.experts.hidden == 20 // 4
    (said,) = succeed(1, "export", tmp_path / "copies", "--hf", tmp_path / "mixtral")
    assert said.out.startswith("MixtralForCausalLM of ")
    stock = load_file(tmp_path / "mixtral/model.safetensors")
    assert len(stock) == 2 + 4 * (6 + 1 + 3 * 4)


def refusal(*arguments: object) -> str:
    (outcome,) = on_ranks(1, run_here, [str(argument) for argument in arguments])
    assert outcome.code == 2
    return outcome.err


def test_refusals(sharded: Path, exported: Path, dense: Path, config: Path, tmp_path: Path) -> None:
    assert "name either FILE.safetensors or --hf DIR" in refusal("export", sharded)
    assert "cannot be written as MixtralForCausalLM" in refusal(
        "export", sharded, "--hf", tmp_path / "x", "--architecture", "mixtral"
    )
    assert "exists already; name another directory" in refusal("export", sharded, "--hf", exported)
    assert "say --config CONFIG" in refusal("import", dense, tmp_path / "run")
    begin = ["import", dense, tmp_path / "run", "--config", config]
    assert "model.dim=64 cannot be chosen: it is the checkpoint's" in refusal(*begin, "model.dim=64")
    assert "tokens, the data one of" in refusal(*begin, "data.vocab_size=280")
    assert "does not divide the feed-forward width 20" in refusal(
        *begin, "--experts", "split", "model.num_experts=3", "model.gate.k=1"
    )
    other = shutil.copytree(dense, tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(content))
    assert "is not the tokenizer of the data" in refusal("import", other, tmp_path / "run", "--config", config)
    tokenizer.write_text("{}")
    assert "tokenizer.json cannot be read: " in refusal("import", other, tmp_path / "run", *begin[3:])
    assert not (tmp_path / "run").exists()
    assert "--architecture=llama goes with --hf DIR" in refusal(
        "export", sharded, tmp_path / "x.safetensors", "--architecture", "llama"
    )


def test_only_decoders_can_be_written(sharded: Path, tmp_path: Path, tiny_data: dict[str, str]) -> None:
    from tests.helpers.runs import write_config

    recommender = write_config(tmp_path / "config", tiny_data, train={"max_steps": 1})
    succeed(1, "train", "--run-dir", tmp_path / "run", recommender)
    assert "model.name=recommender" in refusal("export", tmp_path / "run", "--hf", tmp_path / "x")
