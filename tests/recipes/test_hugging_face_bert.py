"""dist-moe export --hf of BERTs: what transformers loads has their weights, their answers and their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_moe.parallel import SingleWorld
from dist_moe.recipes.recipe import load_config, plan_new_run
from dist_moe.recipes.supervised.runs import trained_model
from dist_moe.tasks.labelled_text.task import LabelledTextTask
from tests.data.labelled_text.tiny_texts import SAMPLES, read_squad, write_messages
from tests.helpers.berts import mask_of
from tests.helpers.commands import run_here, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import tensors_of
from tests.helpers.text_runs import begun_model, write_encoder, write_text_config

transformers = pytest.importorskip("transformers")

EXPERTS = {
    name: f"model={{name: {name}, num_experts: 2, expert_hidden: 16, dropout: 0.0, gate: {{name: comet, gamma: 1.0}}}}"
    for name in ("bert_classifier", "bert_answerer")
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    data = {"name": "sms-spam", "root": str(write_messages(root / "raw", count=120))}
    return write_text_config(root, write_encoder(root / "encoder"), data, train={"max_steps": 2})


@pytest.fixture(scope="module")
def sharded(config: Path) -> Path:
    run = config.parent / "sharded"
    begin = ["start.conversion.method=copies", "start.conversion.noise=0.1", "model.permutation.epochs=0.1"]
    succeed(2, "train", "--run-dir", run, config, EXPERTS["bert_classifier"], *begin, "parallel.expert_parallel_size=2")
    return run


@pytest.fixture(scope="module")
def dense(config: Path) -> Path:
    succeed(1, "train", "--run-dir", config.parent / "dense", config)
    return config.parent / "dense"


def export(run: Path, directory: Path) -> str:
    (said,) = succeed(1, "export", run, "--hf", directory)
    return said.out


def load(directory: Path, kind: str = "SequenceClassification") -> tuple[Any, Any]:
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(directory, trust_remote_code=True)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)


def task_of(run: Path) -> LabelledTextTask:
    task = load_config(run / "config.yaml").data.open(progress=False)
    assert isinstance(task, LabelledTextTask)
    return task


def trained_with_experts(root: Path, data: dict[str, str | int], model: str) -> Path:
    """On a sample of ours."""
    config = write_text_config(root, write_encoder(root / "encoder"), data, model={"name": model})
    begin = ["start.conversion.method=copies", "start.conversion.noise=0.1", "train={max_steps: 2, batch_size: 4}"]
    succeed(1, "train", "--run-dir", root / "run", config, EXPERTS[model], *begin)
    return root / "run"


@torch.no_grad()
def assert_same_answers(run: Path, directory: Path) -> None:
    """Of the test part's first texts, as our own data cuts and pads them."""
    task = task_of(run)
    ours, (theirs, tokenizer) = trained_model(run, task, SingleWorld()).eval(), load(directory)
    first = np.arange(8)
    batch = task.test.batch(first, first)
    mask_BS = mask_of(batch.token_BS, batch.length_B)
    found = theirs(input_ids=batch.token_BS, attention_mask=mask_BS).logits
    torch.testing.assert_close(found, ours(*batch.inputs).predictions[0], rtol=1e-5, atol=1e-5)
    assert theirs.config.id2label == {0: "ham", 1: "spam"}
    told = transformers.pipeline("text-classification", model=theirs, tokenizer=tokenizer)(["win a prize", "see you"])
    row_BL = tokenizer(["win a prize", "see you"], padding=True, return_tensors="pt")
    length_B = row_BL["attention_mask"].sum(1)
    share_BC = ours(row_BL["input_ids"], length_B).predictions[0].softmax(1)
    assert [answer["label"] for answer in told] == [("ham", "spam")[i] for i in share_BC.argmax(1)]
    assert [answer["score"] for answer in told] == pytest.approx(share_BC.amax(1).tolist(), abs=1e-5)
    assert tokenizer.model_max_length == 48


def test_a_sharded_run_with_experts(sharded: Path, tmp_path: Path) -> None:
    directory = tmp_path / "exported"
    masters = {key: value for key, value in tensors_of(sharded).items() if "|master" in key}
    said = export(sharded, directory)
    parameters = sum(value.numel() for value in masters.values())
    assert said.startswith(f"DistMoEBertForSequenceClassification of {parameters:,} parameters in ")
    assert {path.name for path in directory.iterdir()} == {
        "config.json", "model.safetensors", "modeling_dist_moe_bert.py", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert_same_answers(sharded, directory)
    model, _ = load(directory)
    up = model.blocks[0].feed_forward.moe.experts.up
    for expert in range(2):
        assert torch.equal(up[expert], masters[f"encoder.layers.0.feed_forward.moe.experts.up|master|{expert}"])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_layers_of_different_size(sharded: Path, tmp_path: Path) -> None:
    """The first layer's experts are one, the second's are as they were."""
    succeed(1, "compress", sharded, tmp_path / "fewer", "groups=[[[0, 1]], [[0], [1]]]")
    export(tmp_path / "fewer", tmp_path / "exported")
    assert_same_answers(tmp_path / "fewer", tmp_path / "exported")
    model, _ = load(tmp_path / "exported")
    assert [len(block.feed_forward.moe.experts.up) for block in model.blocks] == [1, 2]


def test_a_dense_run_is_a_plain_bert_from_which_another_run_can_begin(
    dense: Path, config: Path, tmp_path: Path
) -> None:
    assert export(dense, tmp_path / "bert").startswith("BertForSequenceClassification of ")
    assert not list((tmp_path / "bert").glob("*.py"))
    assert_same_answers(dense, tmp_path / "bert")
    plan = plan_new_run(config, [f"data.encoder={tmp_path / 'bert'}"], tmp_path / "run")
    model = begun_model(plan.config, plan.task)
    for name, parameter in trained_model(dense, plan.task, SingleWorld()).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@torch.no_grad()
def test_pairs_with_a_score(tmp_path: Path) -> None:
    run = trained_with_experts(tmp_path, {"name": "sts-b", "root": str(SAMPLES / "STS-B")}, "bert_classifier")
    assert export(run, tmp_path / "exported").startswith("DistMoEBertForSequenceClassification of ")
    task, (theirs, tokenizer) = task_of(run), load(tmp_path / "exported")
    pairs = [("A man cuts bread.", "A man is slicing bread."), ("A bird sings.", "A car stops.")]
    rows = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    first = np.arange(2)
    batch = task.test.batch(first, first)
    assert batch.type_BS is not None
    assert torch.equal(rows["input_ids"], batch.token_BS)
    assert torch.equal(rows["token_type_ids"] * rows["attention_mask"], batch.type_BS * rows["attention_mask"])
    expected_B1 = trained_model(run, task, SingleWorld()).eval()(*batch.inputs).predictions[0]
    torch.testing.assert_close(theirs(**rows).logits, expected_B1, rtol=1e-5, atol=1e-5)
    assert expected_B1.shape == (2, 1)
    assert theirs.config.problem_type == "regression"


@torch.no_grad()
def test_answers_in_windows(tmp_path: Path) -> None:
    data = {"name": "squad-v2", "root": str(SAMPLES / "SQuAD"), "max_length": 64, "stride": 8}
    run = trained_with_experts(tmp_path, data, "bert_answerer")
    assert export(run, tmp_path / "exported").startswith("DistMoEBertForQuestionAnswering of ")
    task, (theirs, tokenizer) = task_of(run), load(tmp_path / "exported", "QuestionAnswering")
    _, dev = read_squad(SAMPLES / "SQuAD")
    texts = [question.question for question in dev], [question.context for question in dev]
    cut = {"truncation": "only_second", "stride": 8, "return_overflowing_tokens": True}
    rows = tokenizer(*texts, padding=True, return_tensors="pt", **cut)
    every = np.arange(len(task.test))
    assert rows.pop("overflow_to_sample_mapping").bincount().max() > 1
    batch = task.test.batch(every, every)
    assert torch.equal(rows["input_ids"], batch.token_BS)
    expected = trained_model(run, task, SingleWorld()).eval()(*batch.inputs)
    found = theirs(**rows)
    for logits_BS, expected_BS in zip((found.start_logits, found.end_logits), expected.predictions, strict=True):
        torch.testing.assert_close(logits_BS[expected.real_BS], expected_BS[expected.real_BS], rtol=1e-5, atol=1e-5)


def test_architectures_are_of_decoders(dense: Path, tmp_path: Path) -> None:
    arguments = ["export", str(dense), "--hf", str(tmp_path / "x"), "--architecture", "llama"]
    (outcome,) = on_ranks(1, run_here, arguments)
    assert outcome.code == 2
    assert "--architecture=llama is a decoder's; leave it out for model.name=bert_classifier" in outcome.err
    assert not (tmp_path / "x").exists()
