"""The recipe merge_compress on a tiny language model: what is trained, in any layout, interrupted and resumed."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from dist_moe.engine.checkpoint import newest_checkpoint, read_model, write_first_checkpoint
from dist_moe.engine.launch.emulation import as_first_of
from dist_moe.recipes import load_config
from dist_moe.recipes.merge_compress import recipe as recipe_module
from tests.data.labelled_text.tiny_texts import write_messages
from tests.helpers.commands import dist_moe, run_here, signalled, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import largest_difference, records_of, tensors_of, validations_of, write_config
from tests.helpers.text_runs import write_encoder, write_text_config
from tests.helpers.texts import write_lm_config

MODEL = {"num_experts": 8, "gate": {"name": "top_k", "k": 2, "balance_weight": 0.1, "bias_update_rate": 0.01}}
STEPS = 12
MERGE = ["--experts", "4", "--grouping", "uniform", "examples=40"]
RECOVER = ["--recover", f"train.max_steps={STEPS}", "train.validate_every=6", "train.checkpoint_every=5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_text: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("source")
    config = write_lm_config(root, tiny_text, model=MODEL, train={"max_steps": 40})
    succeed(1, "train", config, "--run-dir", root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def recovered(run: Path) -> Path:
    """The run with half of its experts, all but the gates trained."""
    succeed(1, "compress", run, run.with_name("recovered"), *MERGE, *RECOVER)
    return run.with_name("recovered")


def result_of(run: Path, stage: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "stages" / stage / "result.json").read_text())
    return result


def evaluated(path: Path) -> float:
    (outcome,) = succeed(1, "evaluate", path, "--json")
    return float(json.loads(outcome.out)["test"]["loss"])


def test_it_lowers_the_loss_and_leaves_the_gates_as_they_were(run: Path, recovered: Path) -> None:
    merged, after = (recovered / "stages" / stage for stage in ("merge", "recover"))
    report = result_of(recovered, "recover")
    assert report["val"]["loss"] < report["val_before"]["loss"] - 0.01
    test = {path: evaluated(path) for path in (merged, recovered)}
    assert test[recovered] < test[merged] - 0.01
    assert report["test"]["loss"] == test[recovered]
    assert result_of(recovered, "merge")["parameters_after"] < result_of(recovered, "merge")["parameters_before"]
    assert list(validations_of(after)) == [0, 6]
    source, before, now = (tensors_of(path) for path in (run, merged, after))
    held = [name for name in source if ".gates." in name and name in now]
    assert {name.rpartition("|")[2] for name in held} == {"master", "buffer"}, "no moments of what is held"
    assert all(source[name].equal(now[name]) for name in held)
    assert all(not before[name].equal(now[name]) for name in before if "|master" in name and ".gates." not in name)
    assert {"load_balance", "entropy"}.isdisjoint(records_of(after)[0]), "held gates have no auxiliary losses"


def test_router_kd_trains_the_gates_alone_by_the_teacher_alone(run: Path, tmp_path: Path) -> None:
    options = ["recover.trained=router", "train.max_steps=30", "deepspeed.optimizer.params.lr=0.03"]
    succeed(1, "compress", run, tmp_path / "out", *MERGE, *RECOVER, *options)
    merged, after = (tensors_of(tmp_path / "out" / "stages" / stage) for stage in ("merge", "recover"))
    changed = {name.partition("|")[0] for name in merged if not merged[name].equal(after[name])}
    assert changed == {f"layers.{i}.moe.gates.0.{name}" for i in (1, 3) for name in ("weight", "bias", "bias_steps")}
    records = records_of(tmp_path / "out" / "stages" / "recover")
    for record in records:
        assert record["total_loss"] == pytest.approx(record["teacher_next_token"], rel=1e-6)
    means = [sum(record["teacher_next_token"] for record in part) for part in (records[:8], records[-8:])]
    assert means[1] < means[0]


LAYOUTS = {
    "ep 2": (2, ["parallel.expert_parallel_size=2"]),
    "zero 3": (2, ["deepspeed.zero_optimization={stage: 3, stage3_param_persistence_threshold: 0}"]),
    "4 ranks, ep 2, zero 2": (4, ["parallel.expert_parallel_size=2", "deepspeed.zero_optimization.stage=2"]),
    "4 ranks, ep 4": (4, ["parallel.expert_parallel_size=4"]),
    "accumulation": (1, ["deepspeed.gradient_accumulation_steps=2"]),
}


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] * ("4" in name)) for name in LAYOUTS])
def test_every_layout_gives_the_same(run: Path, recovered: Path, tmp_path: Path, layout: str) -> None:
    world, options = LAYOUTS[layout]
    succeed(world, "compress", run, tmp_path / "out", *MERGE, *RECOVER, *options)
    ours, theirs = (masters_of(path / "stages" / "recover") for path in (tmp_path / "out", recovered))
    assert largest_difference(ours, theirs) < 2e-5
    groups = [result_of(path, "merge")["layers"] for path in (tmp_path / "out", recovered)]
    assert [layer["groups"] for layer in groups[0]] == [layer["groups"] for layer in groups[1]]
    losses = [
        [record["teacher_next_token"] for record in records_of(path / "stages" / "recover")]
        for path in (tmp_path / "out", recovered)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_ranks_that_cannot_have_equally_many_experts_have_them_all(run: Path, tmp_path: Path) -> None:
    options = ["examples=40", "--grouping", "uniform", "train.max_steps=2", "parallel.expert_parallel_size=2"]
    first, _ = succeed(2, "compress", run, tmp_path / "out", "--experts", 3, "--recover", *options)
    assert "stage recover: experts over 1 rank(s): 2 would not have equally many" in first.err
    succeed(2, "evaluate", tmp_path / "out")


def masters_of(run: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors_of(run).items() if "|master" in name}


def assert_same_end(one: Path, other: Path) -> None:
    for stage in ("merge", "recover"):
        ours, theirs = (tensors_of(path / "stages" / stage) for path in (one, other))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    assert result_of(one, "recover") == result_of(other, "recover")


def test_interrupted_while_it_recovers_it_goes_on_to_the_bit(run: Path, recovered: Path, tmp_path: Path) -> None:
    arguments = ["compress", str(run), str(tmp_path / "out"), *MERGE, *RECOVER]
    (stopped,) = on_ranks(1, signalled, signal.SIGTERM, 8, 0, arguments)
    assert stopped.code == 128 + signal.SIGTERM
    assert f"dist-moe train --resume {tmp_path / 'out'}" in stopped.err
    (refused,) = dist_moe(1, "evaluate", tmp_path / "out")
    assert refused.code == 2
    assert "its stage recover has not finished" in refused.err
    merged = (tmp_path / "out" / "stages" / "merge" / "result.json").stat()
    succeed(1, "train", "--resume", tmp_path / "out")
    assert (tmp_path / "out" / "stages" / "merge" / "result.json").stat().st_mtime_ns == merged.st_mtime_ns
    assert_same_end(tmp_path / "out", recovered)
    (again,) = succeed(1, "train", "--resume", tmp_path / "out")
    assert "step" not in again.err, "both stages have finished"


def dying(arguments: list[str]) -> str:
    """Run a command whose stage ``merge`` dies after its checkpoint, before its report."""
    say, recipe_module.report_text = recipe_module.report_text, lambda report: 1 / 0  # type: ignore[assignment]
    try:
        run_here(arguments)
    except ZeroDivisionError as error:
        return type(error).__name__
    finally:
        recipe_module.report_text = say
    return "it lives"


def test_dead_while_it_merges_the_same_command_begins_again(run: Path, recovered: Path, tmp_path: Path) -> None:
    arguments = ["compress", str(run), str(tmp_path / "out"), *MERGE, *RECOVER]
    assert on_ranks(1, dying, arguments) == ["ZeroDivisionError"]
    assert newest_checkpoint(tmp_path / "out" / "stages" / "merge")
    succeed(1, *arguments)
    assert_same_end(tmp_path / "out", recovered)


def copy_of(run: Path, source: Path, factor: float) -> Path:
    """A run with the same weights, but for one that is multiplied."""
    weights = read_model(newest_checkpoint(run))

    def read(name: str, expert: int | None) -> Tensor:
        return weights.read(name, expert) * (factor if name == "norm.weight" else 1)

    write_first_checkpoint(replace(weights, read=read), source / "checkpoints", "a test", weights.identity)
    (source / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    return source


def test_a_source_that_changed_is_refused(run: Path, tmp_path: Path) -> None:
    source, out = copy_of(run, tmp_path / "source", 1.0), tmp_path / "out"
    arguments = ["compress", str(source), str(out), *MERGE, *RECOVER]
    on_ranks(1, signalled, signal.SIGTERM, 8, 0, arguments)
    copy_of(run, source, 2.0)
    (outcome,) = dist_moe(1, "train", "--resume", out)
    assert outcome.code == 2
    assert f"{out}: the source changed since it was trained" in outcome.err


def numbers_of(run: Path, of_experts: bool) -> int:
    masters = {name: tensor for name, tensor in tensors_of(run).items() if "|master" in name}
    return sum(tensor.numel() for name, tensor in masters.items() if (".experts." in name) == of_experts)


def test_the_file_says_little_and_means_the_same(run: Path, recovered: Path, tmp_path: Path) -> None:
    """What is left out is the source's; what is not is laid over it."""
    merge = {"experts": 4, "grouping": "uniform", "examples": 40}
    content = {
        "recipe": {"name": "merge_compress", "source": str(run), "merge": merge},
        "train": {"max_steps": STEPS, "validate_every": 6, "checkpoint_every": 5},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_config(path).plain() == load_config(recovered / "config.yaml").plain()
    source = load_config(run / "config.yaml")
    changed = load_config(path, ["deepspeed.optimizer.params.lr=0.5", "deepspeed.scheduler=null", "data.held_out=0.3"])
    assert changed.deepspeed["optimizer"]["params"] == source.deepspeed["optimizer"]["params"] | {"lr": 0.5}
    assert changed.data == source.data.model_copy(update={"held_out": 0.3})
    assert changed.model == source.model
    planned = json.loads(run_here(["plan", str(path), "--json", "parallel.expert_parallel_size=2", "--ranks", "2"]).out)
    dense, experts = (4 * numbers_of(run, of_experts) for of_experts in (False, True))
    assert planned["teachers"] == dense + experts // 2 + planned["buffers"], "in fp32, its experts over two ranks"
    other = load_config(path, ["deepspeed.optimizer={type: SGD, params: {lr: 1}}"])
    assert other.deepspeed["optimizer"] == {"type": "SGD", "params": {"lr": 1}}
    succeed(1, "train", path, "--run-dir", tmp_path / "out")
    assert_same_end(tmp_path / "out", recovered)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["recover.trained=gates", "--recover"], ["recover.trained='gates'", "router"]),
        (["recover.weight=0", "recover.task_weight=0", "--recover"], ["nothing to learn from"]),
        (["excluded_layers=[7]", "--recover"], ["excluded_layers=[7]", "0..1"]),
        (["train.epochs=1"], ["train.epochs=1", "--recover"]),
        (["recover.weight=1"], ["recover.weight=1", "--recover"]),
        (["model.num_experts=4", "--recover"], ["model.num_experts=4", "has 8", "leave the section model out"]),
        (["data.vocab_size=290", "--recover"], ["the tokenizer", "changed since it was trained"]),
        (["parallel.expert_parallel_size=3", "--recover"], ["parallel.expert_parallel_size=3"]),
        (["train.batch_size=100000", "--recover"], ["train.batch_size=100000"]),
        (["start.run=x", "--recover"], ["start"]),
    ],
)
def test_refusals(run: Path, tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    """Before any process group: on one rank of two that never meet."""
    with as_first_of(2):
        outcome = run_here(["compress", str(run), str(tmp_path / "out"), "--experts", "4", *arguments])
    assert outcome.code == 2, outcome
    assert all(part in outcome.err for part in parts), outcome.err
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_used_output_and_a_source_that_is_none_are_refused(run: Path, tmp_path: Path) -> None:
    outcome = run_here(["compress", str(run), str(run), *MERGE, *RECOVER])
    assert outcome.code == 2
    assert f"OUT {run} holds a run already" in outcome.err
    outcome = run_here(["compress", str(tmp_path), str(tmp_path / "out"), *MERGE, *RECOVER])
    assert outcome.code == 2
    assert "recipe.source" in outcome.err


def test_what_recovered_is_a_run_as_any_other(recovered: Path, tmp_path: Path) -> None:
    """It is evaluated, exported, searched, inspected, resharded, compressed again without and with recovery."""
    tested = result_of(recovered, "recover")["test"]["loss"]
    succeed(1, "export", recovered, tmp_path / "model.safetensors")
    succeed(1, "search", recovered, "--output", tmp_path / "searched", "examples=8")
    succeed(1, "compress", recovered, tmp_path / "again", "--experts", 4, "--grouping", "uniform")
    for path in (tmp_path / "model.safetensors", tmp_path / "again"):
        assert evaluated(path) == pytest.approx(tested, abs=1e-6)
    (inspected,) = succeed(1, "inspect", recovered)
    assert f"step {STEPS}" in inspected.out or f"step-{STEPS:08d}" in inspected.out
    succeed(1, "reshard", recovered, "--output", tmp_path / "resharded", "--expert-files", 2)
    assert evaluated(tmp_path / "resharded") == tested
    succeed(1, "train", "--resume", tmp_path / "again", "train.max_steps=1")
    arguments = ["compress", recovered, tmp_path / "twice", "--experts", 2, "--recover", "train.max_steps=1"]
    succeed(1, *arguments)
    assert (
        result_of(tmp_path / "twice", "merge")["parameters_before"] == result_of(recovered, "merge")["parameters_after"]
    )


def test_a_bert_follows_hidden_states_and_a_recommender_both_targets(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    data = {"name": "sms-spam", "root": str(write_messages(tmp_path / "messages"))}
    model = {"moe_every": 1, "expert_hidden": 16, "gate": {"name": "top_k", "k": 2}}
    encoder = write_encoder(tmp_path / "encoder")
    start = {"conversion": {"method": "copies", "noise": 0.5}}
    bert = write_text_config(tmp_path / "bert", encoder, data, model=model, start=start, train={"max_steps": 2})
    recommender = write_config(tmp_path / "recommender", tiny_data, train={"max_steps": 2})
    for config, options, names in (
        (bert, ["recover.hidden_weight=1"], {"teacher_label", "teacher_hidden"}),
        (recommender, ["recover.trained=experts"], {"teacher_watched", "teacher_rating"}),
    ):
        source, out = config.parent / "run", config.parent / "out"
        succeed(1, "train", config, "--run-dir", source)
        succeed(1, "compress", source, out, "--experts", 2, "--recover", "train.max_steps=3", *options)
        records = records_of(out / "stages" / "recover")
        assert names <= records[0].keys()
        assert not {"entropy", "load_balance"} & records[0].keys()
        merged, after = (tensors_of(out / "stages" / stage) for stage in ("merge", "recover"))
        changed = {name for name in merged if not merged[name].equal(after[name])}
        assert not any(".gates." in name for name in changed)
        assert any(".experts." in name for name in changed)
        assert all(".experts." in name for name in changed) == ("recover.trained=experts" in options)
    arguments = ["compress", source, tmp_path / "no", "--experts", 2, "--recover", "recover.hidden_weight=1"]
    (outcome,) = dist_moe(1, *arguments)
    assert outcome.code == 2
    assert "recover.hidden_weight=1: model.name=recommender gives no hidden states" in outcome.err


def test_a_language_model_follows_hidden_states(run: Path, tmp_path: Path) -> None:
    options = ["recover.hidden_weight=0.5", "recover.task_weight=0", "recover.weight=0", "train.max_steps=30"]
    succeed(1, "compress", run, tmp_path / "out", *MERGE, *RECOVER, *options)
    losses = [record["teacher_hidden"] for record in records_of(tmp_path / "out" / "stages" / "recover")]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
