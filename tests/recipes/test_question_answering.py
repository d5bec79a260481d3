"""Answers to questions through the command line: equal on one and two ranks, learnt by heart, converted, taught."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.data.labelled_text.answers import window_starts
from dist_moe.data.labelled_text.squad import Question
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError
from dist_moe.models.bert import BertModel, read_hugging_face
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.recipe import load_config, plan_new_run, validate_config
from dist_moe.recipes.supervised import runs as runs_module
from dist_moe.recipes.supervised.runs import trained_model
from dist_moe.tasks import build_model
from dist_moe.tasks.labelled_text.answer_metrics import answer_figures
from dist_moe.tasks.labelled_text.question_answering import QuestionAnsweringTask
from tests.data.labelled_text.tiny_texts import SAMPLES, read_squad, tiny_tokenizer
from tests.helpers.commands import succeed
from tests.helpers.runs import losses_of, records_of, summary_of
from tests.helpers.text_runs import (
    POSITIONS,
    taught,
    train_students,
    train_teachers,
    write_encoder,
    write_text_config,
)

SQUAD = SAMPLES / "SQuAD"
STRIDE, LONGEST = 8, 20
STUDENT = [
    "model={name: bert_answerer, num_experts: 2, dropout: 0.0, gate: {name: comet, k: 1, gamma: 1.0}}",
    "start.conversion.shared=4",
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def write_config(directory: Path, encoder: Path) -> Path:
    data = {"name": "squad-v2", "root": str(SQUAD), "max_length": POSITIONS, "stride": STRIDE}
    return write_text_config(directory, encoder, data | {"longest_answer": LONGEST}, model={"name": "bert_answerer"})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("questions"), encoder)


@pytest.fixture(scope="module")
def teachers(config: Path) -> dict[int, Path]:
    return train_teachers(config)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configuration and the run of a model that has seen the sample often."""
    directory = tmp_path_factory.mktemp("learnt")
    config = write_config(directory, write_encoder(directory / "encoder", width=48, heads=4, hidden=96))
    overrides = ["train.max_steps=300", "train.epochs=1000", "train.validate_every=1000"]
    succeed(1, "train", "--run-dir", directory / "run", config, *overrides)
    return config, directory / "run"


@pytest.fixture(scope="module")
def students(config: Path, teachers: dict[int, Path]) -> dict[int, Path]:
    return train_students(config, teachers[1], STUDENT)


def task_of(config: Path, *overrides: str) -> QuestionAnsweringTask:
    task = load_config(config, overrides).data.open(progress=False)
    assert isinstance(task, QuestionAnsweringTask)
    return task


def test_a_run_begins_with_the_encoder_and_without_its_pooler(config: Path, encoder: Path) -> None:
    run_config, task = load_config(config), task_of(config)
    model = build_model(run_config, task, SingleWorld())
    drawn = model.get_parameter("span.weight").clone()
    run_config.start.fill(model, run_config, task, LaunchEnvironment.read())
    weights = read_hugging_face(encoder).weights
    above = {"pooler.weight", "pooler.bias"}
    assert weights.keys() - above == {name for name, _ in model.named_parameters()} - {"span.weight", "span.bias"}
    for name in weights.keys() - above:
        assert torch.equal(model.get_parameter(name), weights[name]), name
    assert torch.equal(model.get_parameter("span.weight"), drawn)


def test_two_ranks_train_as_one(config: Path, teachers: dict[int, Path]) -> None:
    """Of one question of the test part each rank has windows."""
    question_N = task_of(config).test.question_N
    boundary = -(-len(question_N) // 2)
    assert question_N[boundary - 1] == question_N[boundary]
    losses = losses_of(teachers[1])
    assert losses[-1] < losses[0]
    torch.testing.assert_close(losses_of(teachers[2]), losses, rtol=0, atol=1e-5)
    one, two = (summary_of(run)["test"] for run in teachers.values())
    for name in ("ce", "loss", "exact_match", "f1", "f1_answered", "exact_match_unanswerable"):
        assert one[name] == pytest.approx(two[name], abs=1e-5), name


def test_figures_by_hand(learnt: tuple[Path, Path]) -> None:
    """One window at a time, without padding; every span of it, and its words from the tokenizer's own places."""
    config, run = learnt
    task, (_, dev) = task_of(config), read_squad(SQUAD)
    model = trained_model(run, task, SingleWorld()).eval()
    losses: list[float] = []
    answers = []
    for number, question in enumerate(dev):
        windows = np.flatnonzero(task.test.question_N == number)
        answers.append(answer_by_loops(task, model, question, windows, losses))
    assert any(answers)
    summary = summary_of(run)
    expected = answer_figures(answers, [[answer.text for answer in question.answers] for question in dev])
    expected |= {"ce": float(np.mean(losses)), "loss": float(np.mean(losses))}
    for name, value in expected.items():
        assert summary["test"][name] == pytest.approx(value, abs=1e-5), name
    silent = summary["baselines"]["no answer"]
    assert (silent["exact_match"], silent["f1_unanswerable"], silent["f1_answered"]) == (pytest.approx(1 / 3), 1, 0)


def answer_by_loops(
    task: QuestionAnsweringTask, model: BertModel, question: Question, windows: Any, losses: list[float]
) -> str:
    head = len(tiny_tokenizer().encode(question.question).ids)
    places = tiny_tokenizer().encode(question.context, add_special_tokens=False).offsets
    room = POSITIONS - head - 1
    spans: list[tuple[float, int, int]] = []
    none = []
    for window, begin in zip(windows, window_starts(len(places), room, STRIDE), strict=True):
        batch = task.test.batch(np.array([window]), np.array([window]))
        with torch.no_grad():
            start_S, end_S = (logits[0].double() for logits in model(*batch.inputs).predictions)
        none.append(float(start_S[0] + end_S[0]))
        first, last = batch.label_B[0].tolist()
        losses.append(-float(start_S.log_softmax(0)[first] + end_S.log_softmax(0)[last]) / 2)
        text = range(head, len(start_S) - 1)
        spans += [
            (float(start_S[i] + end_S[j]), begin + i - head, begin + j - head)
            for i in text
            for j in text
            if i <= j < i + LONGEST
        ]
    score, i, j = max(spans)
    return "" if min(none) > score else question.context[places[i][0] : places[j][1]]


def test_the_sample_is_learnt_by_heart(learnt: tuple[Path, Path]) -> None:
    config, run = learnt
    task = task_of(config)
    model = trained_model(run, task, SingleWorld()).eval()
    every = np.arange(len(task.train))
    batch = task.train.batch(every, every)
    with torch.no_grad():
        columns = task.observe(model(*batch.inputs), batch).numpy()
    figures = task.figures(columns, task.train, (1.0,))
    assert figures["ce"] < 0.05
    assert figures["exact_match"] == figures["f1"] == figures["exact_match_unanswerable"] == 1


def test_two_ranks_teach_as_one(students: dict[int, Path]) -> None:
    one, two = (records_of(run) for run in students.values())
    assert len(one) == 6
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "teacher_hidden", "teacher_prediction", "total_loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5), name
        assert ours["load"] == theirs["load"]
    for name in ("ce", "exact_match", "f1"):
        figures = [summary_of(run)["test"][name] for run in students.values()]
        assert figures[0] == pytest.approx(figures[1], abs=1e-4), name


def test_the_teachers_ends_are_followed_by_their_mean(
    config: Path, teachers: dict[int, Path], students: dict[int, Path], tmp_path: Path
) -> None:
    """The first step, one window at a time, without padding."""
    plan = plan_new_run(config, [*STUDENT, *taught(teachers[1])], tmp_path / "run")
    task = plan.task
    assert isinstance(task, QuestionAnsweringTask)
    student, teacher = build_model(plan.config, task, SingleWorld()), trained_model(teachers[1], task, SingleWorld())
    plan.config.start.fill(student, plan.config, task, plan.start.environment)
    student.train().begin_step(0)
    teacher.eval()
    batch = plan.feed.micro_batches(0)[0]
    assert batch.type_BS is not None
    divergence = 0.0
    for token_S, length, type_S in zip(batch.token_BS, batch.length_B, batch.type_BS, strict=True):
        with torch.no_grad():
            ours, theirs = (
                m(token_S[None, :length], length[None], type_S[None, :length]).predictions for m in (student, teacher)
            )
        for ours_1S, theirs_1S in zip(ours, theirs, strict=True):
            p, q = (logits[0].double().softmax(0) for logits in (ours_1S, theirs_1S))
            divergence += float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2 / 2
    first = records_of(students[1])[0]
    assert first["teacher_prediction"] == pytest.approx(0.5 * divergence / 16, rel=1e-3)
    assert first["teacher_prediction"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.root=null"], r"data\.root is not given, and no package carries SQuAD v2\. Remedy"),
        (["data.root={absent}"], r"absent is not a directory"),
        (["data.max_length=40"], r"data\.max_length=40: the question 'dev001' has 35 tokens, which leaves 2 for"),
        ([f"data.max_length={POSITIONS + 1}"], rf"max_length={POSITIONS + 1}: the encoder has {POSITIONS} pos"),
        (["data.stride=40"], r"windows are to share data\.stride=40 of them"),
        (["model.name=bert_classifier"], r"bert_classifier does not fit data\.name=squad-v2; use bert_answerer"),
    ],
)
def test_what_a_run_cannot_begin_with(config: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    given = [text.replace("{absent}", str(tmp_path / "absent")) for text in overrides]
    with pytest.raises(UserError, match=message):
        plan_new_run(config, given, tmp_path / "run")


def test_a_classifiers_run_answers_nothing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(config=validate_config({"data": {"name": "rte"}}))
    monkeypatch.setattr(runs_module, "find_weights", lambda _: other)
    with pytest.raises(UserError, match=r"there is a run of model\.name=bert_classifier, not of bert_answerer"):
        trained_model(Path("there"), task_of(config), SingleWorld())
