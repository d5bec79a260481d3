"""DHKD through the command line: a classifier's second head follows a teacher, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_moe.models import BertClassifier
from dist_moe.models.bert import read_hugging_face, write_hugging_face
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.recipe import plan_new_run
from dist_moe.recipes.supervised.runs import trained_model
from dist_moe.tasks.labelled_text.classification import TextClassificationTask
from tests.data.labelled_text.tiny_texts import write_messages, write_ratings
from tests.helpers.commands import run_here, succeed
from tests.helpers.runs import losses_of, records_of, summary_of
from tests.helpers.text_runs import begun_model, write_encoder, write_text_config

LINEAR, MLP = ("model.auxiliary_head=linear", "model.auxiliary_head=mlp")
EXPERTS = ["model.moe_every=1", "model.num_experts=2", "model.gate={name: top_k, k: 1}"]
COPIES = ["start.conversion.method=copies", "model.expert_hidden=16"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    encoder = write_encoder(root / "encoder")
    return write_text_config(root, encoder, {"name": "sms-spam", "root": str(write_messages(root / "raw", count=200))})


@pytest.fixture(scope="module")
def teacher(config: Path) -> Path:
    run = config.parent / "teacher"
    succeed(1, "train", "--run-dir", run, config)
    return run


def followed(teacher: Path, **options: Any) -> list[str]:
    """Overrides of a student that follows ``teacher``."""
    return [f"recipe={json.dumps({'name': 'dhkd', 'teacher': str(teacher)} | options)}"]


def test_without_weight_the_run_is_the_plain_one(config: Path, teacher: Path, tmp_path: Path) -> None:
    """What the second head drops out changes nothing of what the next micro-batch does."""
    common = ["model.dropout=0.1", "deepspeed.gradient_accumulation_steps=2"]
    succeed(1, "train", "--run-dir", tmp_path / "run", config, MLP, *common, *followed(teacher, weight=0))
    succeed(1, "train", "--run-dir", tmp_path / "plain", config, *common)
    assert torch.equal(losses_of(tmp_path / "run"), losses_of(tmp_path / "plain"))
    one, two = (summary_of(tmp_path / run)["test"]["ce"] for run in ("run", "plain"))
    assert one == pytest.approx(two, rel=1e-7)  # other parameters lie in the optimizer's flat buffer beside these
    assert {record["teacher_auxiliary"] for record in records_of(tmp_path / "run")} == {0.0}


def test_two_ranks_with_experts_follow_as_one(config: Path, teacher: Path, tmp_path: Path) -> None:
    common = [LINEAR, *EXPERTS, *COPIES, f"start.run={teacher}", *followed(teacher, align_gradients=True)]
    for world in (1, 2):
        run = tmp_path / str(world)
        succeed(world, "train", "--run-dir", run, config, *common, f"parallel.expert_parallel_size={world}")
    one, two = (records_of(tmp_path / str(world)) for world in (1, 2))
    for ours, theirs in zip(one, two, strict=True):
        for name in ("loss", "teacher_auxiliary", "teacher_cosine", "total_loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=5e-5), name
    assert one[-1]["teacher_auxiliary"] < one[0]["teacher_auxiliary"]
    assert any(record["teacher_cosine"] for record in one)
    again = json.loads(succeed(1, "evaluate", tmp_path / "2", "--json")[0].out)
    assert again["test"]["ce"] == pytest.approx(summary_of(tmp_path / "2")["test"]["ce"], abs=1e-6)


def test_what_the_second_head_adds_by_a_loop(config: Path, teacher: Path, tmp_path: Path) -> None:
    """The first step, one text at a time: T^2 sum of log cosh of half the difference over T, and nothing else."""
    overrides = [LINEAR, *followed(teacher, weight=0.5, temperature=3.0)]
    plan = plan_new_run(config, overrides, tmp_path / "planned")
    assert isinstance(plan.task, TextClassificationTask)
    torch.manual_seed(plan.config.seed)
    student = begun_model(plan.config, plan.task)
    taught = trained_model(teacher, plan.task, SingleWorld()).eval()
    batch = plan.feed.micro_batches(0)[0]
    expected = 0.0
    for token_S, length in zip(batch.token_BS, batch.length_B, strict=True):
        text = (token_S[None, :length], length[None])
        with torch.no_grad():
            difference_C = student.train()(*text).auxiliary_BC[0] - taught(*text).predictions[0][0]
        expected += float((difference_C.double() / 6).cosh().log().sum()) * 9 / len(batch.label_B)
    succeed(1, "train", "--run-dir", tmp_path / "run", config, *overrides, "train.max_steps=1")
    assert records_of(tmp_path / "run")[0]["teacher_auxiliary"] == pytest.approx(0.5 * expected, rel=1e-4)


def test_a_student_starts_from_it_and_hugging_face_gets_it_without_the_head(
    config: Path, teacher: Path, tmp_path: Path
) -> None:
    succeed(1, "train", "--run-dir", tmp_path / "run", config, MLP, *followed(teacher))
    weights = load_file(next((tmp_path / "run" / "checkpoints").glob("*/*.safetensors")))
    assert any("auxiliary" in name for name in weights)
    succeed(1, "train", "--run-dir", tmp_path / "next", config, f"start.run={tmp_path / 'run'}")
    task = plan_new_run(config, [], tmp_path / "planned").task
    assert isinstance(task, TextClassificationTask)
    model = trained_model(tmp_path / "run", task, SingleWorld())
    assert isinstance(model, BertClassifier)
    write_hugging_face(model, tmp_path / "written")
    plain = {name for name, _ in model.named_parameters() if "auxiliary" not in name}
    assert read_hugging_face(tmp_path / "written").weights.keys() == plain


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([LINEAR], "model.auxiliary_head=linear: nothing trains it without recipe.name=dhkd; set it to null"),
        (["recipe={name: dhkd, teacher: x}"], "recipe.name=dhkd: a second head learns the teacher's"),
        (
            [
                MLP,
                "recipe={name: dhkd, teacher: x, align_gradients: true}",
                "deepspeed.zero_optimization.stage=3",
            ],
            "deepspeed.zero_optimization.stage=3: aligning gradients needs whole parameters",
        ),
        (
            ["recipe={name: fitnets, teacher: x}"],
            "recipe.name='fitnets' is not a recipe; allowed: branch_train_merge, dhkd, ",
        ),
        (["recipe={name: moebert, teacher: x, temperature: 2}"], "recipe.temperature=2: there is no such field"),
    ],
)
def test_refusals(config: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    outcome = run_here(["train", "--run-dir", str(tmp_path / "run"), str(config), *overrides])
    assert outcome.code == 2
    assert message in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_number_has_no_logits_to_follow(teacher: Path, config: Path, tmp_path: Path) -> None:
    ratings = write_ratings(tmp_path / "raw", count=80)
    data = {"name": "sentiment-movies", "root": str(ratings), "graded": True}
    graded = write_text_config(tmp_path / "graded", config.parent / "encoder", data)
    command = ["train", "--run-dir", str(tmp_path / "run"), str(graded), MLP, *followed(teacher)]
    outcome = run_here(command)
    assert outcome.code == 2
    assert "model.auxiliary_head=mlp follows the logits of classes, and data.name=sentiment-movies has" in outcome.err
