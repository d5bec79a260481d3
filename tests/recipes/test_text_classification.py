"""Text classifiers through the command line: equal on one and two ranks, fine-tuned, converted, taught."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from dist_moe.errors import UserError
from dist_moe.models import BertClassifierConfig
from dist_moe.models.bert import read_hugging_face
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.recipe import load_config, plan_new_run, plan_resumed_run, validate_config
from dist_moe.recipes.supervised.runs import trained_model
from dist_moe.tasks import build_model
from dist_moe.tasks.labelled_text.classification import TextClassificationTask
from dist_moe.tasks.labelled_text.classification_metrics import f1, matthews, pearson
from tests.data.labelled_text.tiny_texts import write_messages, write_ratings
from tests.helpers.commands import succeed
from tests.helpers.runs import losses_of, records_of, summary_of
from tests.helpers.text_runs import (
    POSITIONS,
    begun_model,
    taught,
    train_students,
    train_teachers,
    write_encoder,
    write_text_config,
)

MOEBERT = ["recipe.name=moebert"]
STUDENT = [
    "model={name: bert_classifier, num_experts: 2, dropout: 0.0, gate: {name: comet, k: 1, gamma: 1.0}}",
    "start.conversion.shared=4",
    "start.importance_examples=40",
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    root = tmp_path_factory.mktemp("texts")
    return write_text_config(root, encoder, {"name": "sms-spam", "root": str(write_messages(root / "raw", count=200))})


@pytest.fixture(scope="module")
def teachers(config: Path) -> dict[int, Path]:
    return train_teachers(config)


@pytest.fixture(scope="module")
def students(config: Path, teachers: dict[int, Path]) -> dict[int, Path]:
    return train_students(config, teachers[1], STUDENT)


def task_of(config: Path, *overrides: str) -> TextClassificationTask:
    task = load_config(config, overrides).data.open(progress=False)
    assert isinstance(task, TextClassificationTask)
    return task


def test_a_run_begins_with_the_encoder(config: Path, encoder: Path) -> None:
    run_config, task = load_config(config), task_of(config)
    drawn = build_model(run_config, task, SingleWorld()).get_parameter("classifier.weight")
    model = begun_model(run_config, task)
    weights = read_hugging_face(encoder).weights
    assert len(weights) == len(list(model.parameters())) - 2
    for name, value in weights.items():
        assert torch.equal(model.get_parameter(name), value), name
    assert torch.equal(model.get_parameter("classifier.weight"), drawn)


def test_two_ranks_fine_tune_as_one(teachers: dict[int, Path]) -> None:
    losses = losses_of(teachers[1])
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses_of(teachers[2]), losses, rtol=0, atol=1e-5)
    one, two = (summary_of(run)["test"] for run in teachers.values())
    for name in ("f1", "accuracy", "matthews", "ce", "loss"):
        assert one[name] == pytest.approx(two[name], abs=1e-5), name


def test_metrics_by_hand(config: Path, teachers: dict[int, Path]) -> None:
    """One text at a time, without padding."""
    task = task_of(config)
    model = trained_model(teachers[1], task, SingleWorld()).eval()
    surprise, answers = [], []
    for i in range(len(task.test)):
        batch = task.test.batch(np.array([i]), np.array([i]))
        with torch.no_grad():
            row = model(*batch.inputs).predictions[0][0].double().tolist()
        surprise.append(math.log(sum(map(math.exp, row))) - row[int(batch.label_B)])
        answers.append(row.index(max(row)))
    true_N, summary = np.asarray(task.test.target_N), summary_of(teachers[1])
    expected = {
        "ce": float(np.mean(surprise)),
        "loss": float(np.mean(surprise)),
        "accuracy": float(np.mean(np.array(answers) == true_N)),
        "f1": f1(np.array(answers), true_N),
        "matthews": matthews(np.array(answers), true_N),
    }
    for name, value in expected.items():
        assert summary["test"][name] == pytest.approx(value, abs=1e-5), name
    spam = (float(np.sum(task.train.target_N)) + 1) / (len(task.train) + 2)
    constant = summary["baselines"]["constant"]
    assert constant["ce"] == pytest.approx(float(np.mean([-math.log(spam if y else 1 - spam) for y in true_N])))
    assert (constant["accuracy"], constant["f1"]) == (pytest.approx(float(np.mean(true_N == 0))), 0)
    assert summary["data"]["encoder"]["name"] == "directory"


def test_two_ranks_teach_as_one(students: dict[int, Path]) -> None:
    one, two = (records_of(run) for run in students.values())
    assert len(one) == 6
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "teacher_hidden", "teacher_prediction", "total_loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
        assert ours["load"] == theirs["load"]
        parts = ours["loss"] + ours["teacher_hidden"] + ours["teacher_prediction"]
        assert ours["total_loss"] == pytest.approx(parts + ours.get("entropy", 0.0), rel=1e-5)
    assert one[0]["teacher_hidden"] > 0


def test_what_the_teacher_adds_by_a_loop(
    config: Path, teachers: dict[int, Path], students: dict[int, Path], tmp_path: Path
) -> None:
    """The first step, one text at a time, without padding."""
    plan = plan_new_run(config, [*STUDENT, *taught(teachers[1])], tmp_path / "run")
    task = plan.task
    assert isinstance(task, TextClassificationTask)
    student, teacher = begun_model(plan.config, task), trained_model(teachers[1], task, SingleWorld())
    student.train().begin_step(0)
    teacher.eval()
    batch = plan.feed.micro_batches(0)[0]
    hidden, divergence = 0.0, 0.0
    for token_S, length in zip(batch.token_BS, batch.length_B, strict=True):
        with torch.no_grad():
            ours, theirs = (m(token_S[None, :length], length[None], None, True) for m in (student, teacher))
        for x_1SD, y_1SD in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            hidden += float((x_1SD - y_1SD).double().square().mean(dim=2).sum())
        p, q = (output.predictions[0][0].double().softmax(0) for output in (ours, theirs))
        divergence += float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    first = records_of(students[1])[0]
    assert first["teacher_hidden"] == pytest.approx(0.5 * hidden / int(batch.length_B.sum()), rel=1e-4)
    assert first["teacher_prediction"] == pytest.approx(0.5 * divergence / 16, rel=1e-3)


def test_tokens_are_routed_and_padding_is_not(students: dict[int, Path]) -> None:
    """Every token of every text of a step goes to one or two experts of both layers."""
    feed = plan_resumed_run(students[1], []).feed
    for step, record in enumerate(records_of(students[1])):
        (batch,) = feed.micro_batches(step)
        tokens = int(batch.length_B.sum())
        assert tokens < batch.token_BS.numel(), "there is padding"
        for load_E in record["load"]:
            assert tokens <= sum(load_E) <= 2 * tokens
        assert record["active_experts"] == pytest.approx(sum(map(sum, record["load"])) / 2 / tokens)


def test_a_teacher_is_no_part_of_what_is_kept(students: dict[int, Path]) -> None:
    weights = next((students[1] / "checkpoints").glob("*/*.safetensors"))
    assert not any("teacher" in name for name in load_file(weights))
    again = json.loads(succeed(1, "evaluate", students[2], "--json")[0].out)
    assert again["test"]["ce"] == pytest.approx(summary_of(students[2])["test"]["ce"], abs=1e-6)


def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(
    config: Path, teachers: dict[int, Path], tmp_path: Path
) -> None:
    overrides = [
        *taught(teachers[1]),
        "model={name: bert_classifier, num_experts: 2, dropout: 0.0, expert_form: network, expert_hidden: 16, "
        "gate: {name: comet, k: 1, gamma: 1.0}}",
        "start.conversion.method=copies",
        "train.max_steps=2",
    ]
    succeed(1, "train", "--run-dir", tmp_path / "run", config, *overrides)
    first, second = records_of(tmp_path / "run")
    assert first["teacher_hidden"] + first["teacher_prediction"] < 1e-9
    assert second["teacher_hidden"] > 1e-9


def test_importance_does_not_depend_on_padding(config: Path, teachers: dict[int, Path]) -> None:
    """One text at a time: the same conversion, neuron for neuron."""
    found = []
    for size in (64, 1):
        overrides = [f"start.run={teachers[1]}", *STUDENT]
        task = task_of(config, *overrides)
        task.eval_batch = size
        model = begun_model(load_config(config, overrides), task)
        found.append({name: value.detach().clone() for name, value in model.named_parameters()})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_a_number_is_predicted_by_its_squared_error(encoder: Path, tmp_path: Path) -> None:
    root = write_ratings(tmp_path / "raw", "tweets", count=120)
    data = {"name": "sentiment-tweets", "root": str(root), "graded": True}
    path = write_text_config(tmp_path, encoder, data)
    succeed(1, "train", "--run-dir", tmp_path / "run", path)
    summary, task = summary_of(tmp_path / "run"), task_of(path)
    model = trained_model(tmp_path / "run", task, SingleWorld()).eval()
    every = np.arange(len(task.test))
    with torch.no_grad():
        answers = model(*task.test.batch(every, every).inputs).predictions[0][:, 0].double().numpy()
    true_N = np.asarray(task.test.target_N, dtype=np.float64)
    assert summary["test"]["mse"] == pytest.approx(float(np.mean((answers - true_N) ** 2)), rel=1e-5)
    assert summary["test"]["pearson"] == pytest.approx(pearson(answers, true_N), abs=1e-5)
    constant = summary["baselines"]["constant"]
    mean = float(np.mean(task.train.target_N, dtype=np.float64))
    assert constant["mse"] == pytest.approx(float(np.mean((true_N - mean) ** 2)))
    assert (constant["pearson"], constant["spearman"]) == (0, 0)


def test_the_ids_of_tokens_are_counted(config: Path) -> None:
    task = task_of(config)
    counts = task.id_counts()
    rows = [task.train.batch(np.array([i]), np.array([i])).token_BS.flatten() for i in range(len(task.train))]
    assert torch.equal(counts, torch.bincount(torch.cat(rows), minlength=len(counts)))
    assert len(counts) == read_hugging_face(load_config(config).data.encoder).shape.vocab  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (STUDENT, r"start\.run is not given, and start\.conversion\.order=importance needs it.* or .*method=copies$"),
        (
            ["model.hidden=8", "start.conversion.method=copies", "start.conversion.order=inverse"],
            r"start\.run is not given, and start\.conversion\.order=inverse .*set start\.conversion\.order=random$",
        ),
        (["start.run={student}"], r"start\.run=.*its model has experts; name a run with model\.moe_every=0"),
        (["start.run={absent}"], r"start\.run: .*absent.*; name a finished run"),
        ([*MOEBERT, "recipe.teacher={absent}"], r"recipe\.teacher: .*absent.*; name a finished run"),
        (["start.run={dense}", "data.seed=1"], r"start\.run=.* was trained with data\.seed=0, not 1"),
        (
            [*MOEBERT, "recipe.teacher={dense}", "data.seed=1"],
            r"recipe\.teacher=.* trained with data\.seed=0, not 1",
        ),
        (
            ["start.run={dense}", "data.encoder={wider}"],
            r"start: .*token\.weight has shape \(108, 12\), the model's is \(108, 24\)",
        ),
        (
            [*MOEBERT, "recipe.teacher={dense}", "data.encoder={wider}"],
            r"token\.weight has shape \(108, 12\), the model's is \(108, 24\)",
        ),
        ([*STUDENT, "start.run={dense}", "model.moe_every=3"], r"model\.moe_every=3 exceeds layers=2; .*encoder"),
        ([*STUDENT, "start.run={dense}", "model.num_experts=3"], r"model\.num_experts=3: .*give model\.expert_hidden"),
        (
            [*STUDENT, "start.run={dense}", "start.conversion.shared=9"],
            r"start: shared=9 neurons do not fit experts of 8",
        ),
        ([*STUDENT, "start.run={dense}", "start.conversion.method=split"], r"start: conversion\.method=split: experts"),
        (["start.run={dense}", "model.hidden=17"], r"start: model\.hidden=17 exceeds the dense model's 16"),
        (
            [*MOEBERT, "recipe.teacher={dense}", "data.name=trec"],
            r"was trained with data\.name=sms-spam, not trec",
        ),
        ([f"data.max_length={POSITIONS + 1}"], rf"data\.max_length={POSITIONS + 1}: the encoder has {POSITIONS} pos"),
        (["data.encoder={absent}"], r"absent has no config\.json"),
        (["data.tokenizer={larger}"], r"data\.tokenizer knows \d+ tokens, the encoder \d+; leave it out"),
    ],
)
def test_what_a_run_cannot_begin_with(
    config: Path,
    teachers: dict[int, Path],
    students: dict[int, Path],
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    from tests.data.labelled_text.tiny_texts import tiny_tokenizer, write_questions

    larger = tiny_tokenizer()
    larger.add_tokens(["amber"])
    larger.save(str(tmp_path / "larger.json"))
    places = {"student": students[1], "dense": teachers[1], "absent": tmp_path / "absent"}
    places |= {"larger": tmp_path / "larger.json", "wider": write_encoder(tmp_path / "wider", width=24)}
    given = [text.format(**places) if "={" in text and "model={" not in text else text for text in overrides]
    if "data.name=trec" in given:
        given.append(f"data.root={write_questions(tmp_path / 'trec')}")
    with pytest.raises(UserError, match=message):
        plan_new_run(config, given, tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("recipe.name=supervised", "recipe.name='supervised'"),
        ("recipe.weight=2", "recipe.weight=2.0"),
        ("start.conversion.shared=3", "start.conversion={"),
        ("start.importance_examples=7", "start.importance_examples=7"),
        ("start.run=null", "start.run=None"),
    ],
)
def test_a_run_that_goes_on_follows_its_teacher_as_before(students: dict[int, Path], override: str, field: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(field)}.*start a new run"):
        plan_resumed_run(students[1], [override])


def test_a_teacher_may_have_moved(students: dict[int, Path], teachers: dict[int, Path], tmp_path: Path) -> None:
    moved = shutil.copytree(teachers[1], tmp_path / "moved")
    assert plan_resumed_run(students[1], [f"recipe.teacher={moved}"]).checkpoint
    recorded = load_config(moved / "config.yaml", ["data.seed=1"])
    (moved / "config.yaml").write_text(yaml.safe_dump(recorded.plain()))
    with pytest.raises(UserError, match=r"recipe\.teacher=.* was trained with data\.seed=1, not 0"):
        plan_resumed_run(students[1], [f"recipe.teacher={moved}"])


def test_a_model_that_is_asked_again_knows_how_long_its_run_was(
    config: Path, teachers: dict[int, Path], tmp_path: Path
) -> None:
    """Else a gate with a schedule would be at its end, with more experts per token than it was tested with."""
    gate = "model.gate={name: smoe_dropout, evaluation_k: null}"
    overrides = [*STUDENT, gate, f"start.run={teachers[1]}", "train.max_steps=2"]
    succeed(1, "train", "--run-dir", tmp_path / "run", config, *overrides)
    for layer in trained_model(tmp_path / "run", task_of(config), SingleWorld()).moe_layers.values():
        assert layer.gates[0].schedule_steps == 2
        assert layer.gates[0].k_at(int(layer.gates[0].step)) == 1


def test_only_text_classifiers_start_from_something() -> None:
    for section in ({"start": {}}, {"recipe": {"name": "moebert", "teacher": "somewhere"}}):
        wanted = rf"{next(iter(section))}.*: for model\.name=bert_classifier or bert_answerer, not recommender"
        with pytest.raises(UserError, match=wanted):
            validate_config(section).check(1)


def test_a_model_of_text_is_found_by_its_data() -> None:
    config = validate_config({"data": {"name": "rte", "root": "somewhere"}})
    assert isinstance(config.model, BertClassifierConfig)
    assert config.target_weights == (1.0,)
