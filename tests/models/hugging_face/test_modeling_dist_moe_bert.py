"""BERT with experts inside of transformers: any gate, the same hidden states and logits, training, its own process."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.errors import UserError
from dist_moe.gates import CometConfig, HashRoutingConfig, TopKConfig
from dist_moe.models import BertAnswererConfig, BertClassifierConfig, BertModel
from dist_moe.models.bert import write_with_experts
from dist_moe.search import PermutationSearchConfig
from tests.helpers.berts import answerer, build, dense, labels_of, mask_of, texts
from tests.helpers.transformers import EACH_GATE
from tests.models.hugging_face.directories import logits_elsewhere, reconfigure

transformers = pytest.importorskip("transformers")

NETWORK = {"expert_form": "network"}
MODELS: dict[str, dict[str, Any]] = {
    "ada_moe": {"gate": EACH_GATE["ada_moe"], **NETWORK},
    "comet": {"gate": CometConfig(k=1, gamma=1.0)},
    "comet, every 2nd layer": {"gate": CometConfig(k=2, gamma=1.0), "moe_every": 2, "hidden": 8},
    "dselect_k": {"gate": EACH_GATE["dselect_k"], **NETWORK},
    "hash, balanced": {"gate": HashRoutingConfig(assignment="balanced")},
    "hash, random": {"gate": HashRoutingConfig(seed=3)},
    "relu": {"gate": EACH_GATE["relu"]},
    "smoe_dropout": {"gate": EACH_GATE["smoe_dropout"]},
    "softmax": {"gate": EACH_GATE["softmax"], "expert_hidden": 5},
    "top_k": {"gate": TopKConfig(k=2, bias_update_rate=0.1), "auxiliary_head": "linear"},
}


def write(model: BertModel, directory: Path, options: dict[str, Any], **said: Any) -> Path:
    config = BertClassifierConfig if hasattr(model, "classifier") else BertAnswererConfig
    write_with_experts(model, config(**({"dropout": 0.0} | options)), directory, total_steps=100, **said)
    return directory


def load(directory: Path, kind: str = "SequenceClassification") -> Any:
    auto = getattr(transformers, f"AutoModelFor{kind}")
    return auto.from_pretrained(directory, trust_remote_code=True).eval()


def inputs() -> dict[str, torch.Tensor]:
    """For transformers: texts of several lengths, padded with any id."""
    token_BS, length_B = texts()
    mask_BS = mask_of(token_BS, length_B)
    return {"input_ids": token_BS + 7 * (1 - mask_BS), "attention_mask": mask_BS}


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_same_states_logits_and_weights_under_any_gate(tmp_path: Path, case: str) -> None:
    ours = build(**MODELS[case]).eval()
    theirs = load(write(ours, tmp_path, MODELS[case]))
    expected, found = ours(*texts(), hidden_states=True), theirs(**inputs(), output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.predictions[0], rtol=1e-10, atol=1e-10)
    real_BS = expected.real_BS
    for state_BSD, expected_BSD in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state_BSD[real_BS], expected_BSD[real_BS], rtol=1e-10, atol=1e-10)
    loads = [mixture.pairs.rows_per_expert_E.tolist() for mixture in theirs.mixtures]
    assert loads == [layer.pairs.rows_per_expert_E.tolist() for layer in expected.layers]
    for block, layer in zip(theirs.blocks, ours.moe_layers.values(), strict=True):
        for name, buffer in layer.named_buffers():  # those that no checkpoint has, too
            assert torch.equal(block.feed_forward.moe.get_buffer(name), buffer), name
        for name, parameter in layer.named_parameters():
            assert torch.equal(block.feed_forward.moe.get_parameter(name), parameter), name
    kept = [p.numel() for name, p in ours.named_parameters() if not name.startswith("auxiliary.")]
    assert [len(kept), sum(kept)] == [len(list(theirs.parameters())), sum(p.numel() for p in theirs.parameters())]


def test_another_process_loads_comet_plus_and_the_modules_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved again by transformers on the way."""
    options = {"gate": CometConfig(k=1, gamma=1.0), "permutation": PermutationSearchConfig(epochs=2, per_branch=True)}
    ours = build(**options)
    for step in range(3):  # in the midst of learning tables
        ours.begin_step(step)
        ours(*texts())
    (tmp_path / "of_ones_own.py").write_text("open('imported', 'w').close()")
    write(ours.eval(), tmp_path / "first", options, imports=["of_ones_own"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    (tmp_path / "imported").unlink()
    logits_BC = logits_elsewhere("AutoModelForSequenceClassification", tmp_path / "second", inputs())
    torch.testing.assert_close(logits_BC, ours(*texts()).predictions[0], rtol=1e-10, atol=1e-10)
    assert (tmp_path / "imported").exists()
    code = [(tmp_path / name / "modeling_dist_moe_bert.py").read_text() for name in ("first", "second")]
    assert code[0] == code[1]
    assert any(not torch.equal(t.table, torch.arange(4).expand_as(t.table)) for t in ours.tables.values())


@torch.no_grad()
def test_an_answerer_comes_with_its_head(tmp_path: Path) -> None:
    options = {"gate": CometConfig(k=1, gamma=1.0), "moe_every": 1}
    ours = answerer(**options).eval()
    theirs = load(write(ours, tmp_path, options), "QuestionAnswering")
    segment_BS = torch.arange(7).expand(4, 7) // 2 % 2
    expected = ours(*texts(), segment_BS)
    found = theirs(**inputs(), token_type_ids=segment_BS)
    for logits_BS, expected_BS in zip((found.start_logits, found.end_logits), expected.predictions, strict=True):
        torch.testing.assert_close(logits_BS[expected.real_BS], expected_BS[expected.real_BS], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_padding_on_the_left_is_not_routed_either(tmp_path: Path) -> None:
    options = MODELS["hash, random"]
    ours = answerer(**{"moe_every": 1} | options).eval()
    theirs = load(write(ours, tmp_path, options), "QuestionAnswering")
    token_BS, length_B = texts((5,))
    padded = {
        "input_ids": torch.nn.functional.pad(token_BS, (3, 0)),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 5]),
        "position_ids": torch.tensor([[0] * 3 + list(range(5))]),
    }
    expected = ours(token_BS, length_B)
    torch.testing.assert_close(theirs(**padded).start_logits[:, 3:], expected.predictions[0], rtol=1e-10, atol=1e-10)
    assert [int(mixture.pairs.rows_per_expert_E.sum()) for mixture in theirs.mixtures] == [5] * 3


def test_training_counts_the_losses_of_the_gates(tmp_path: Path) -> None:
    options = {"gate": TopKConfig(k=2, balance_weight=0.5)}
    ours = build(**options)
    theirs = load(write(ours, tmp_path, options))
    labelled = inputs() | {"labels": labels_of(4)}
    evaluated = theirs(**labelled).loss
    theirs.train()
    trained = theirs(**labelled).loss
    torch.testing.assert_close(trained - evaluated, sum(ours(*texts()).aux.values()))
    trained.backward()
    assert all(block.feed_forward.moe.gates[0].weight.grad.any() for block in theirs.blocks)


def test_transformers_can_ask_for_the_inputs(tmp_path: Path) -> None:
    """Its Trainer drops the columns of a data set that forward does not name."""
    theirs = load(write(build(**MODELS["comet"]), tmp_path, MODELS["comet"]))
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= inspect.signature(
        theirs.forward
    ).parameters.keys()


def test_a_tuple_has_the_same_loss(tmp_path: Path) -> None:
    options = {"gate": TopKConfig(k=2, balance_weight=0.5)}
    theirs = load(write(build(**options), tmp_path, options)).train()
    labelled = inputs() | {"labels": labels_of(4)}
    loss, logits_BC, *_ = theirs(**labelled, return_dict=False)
    named = theirs(**labelled)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits_BC, named.logits)


@torch.no_grad()
def test_a_copy_after_a_pass_is_a_model_too(tmp_path: Path) -> None:
    theirs = load(write(build(**MODELS["comet"]), tmp_path, MODELS["comet"]))
    expected = theirs.train()(**inputs()).logits
    again = copy.deepcopy(theirs)
    assert again.mixtures == []
    torch.testing.assert_close(again(**inputs()).logits, expected)


def test_layers_cannot_be_computed_again(tmp_path: Path) -> None:
    """Their tokens would be those of another pass."""
    theirs = load(write(build(**MODELS["hash, random"]), tmp_path, MODELS["hash, random"]))
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        theirs.activation_checkpointing_enable()


@torch.no_grad()
def test_the_layers_alone(tmp_path: Path) -> None:
    ours = build(**MODELS["comet"]).eval()
    write(ours, tmp_path, MODELS["comet"])
    theirs = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    expected = ours(*texts(), hidden_states=True)
    last_BSD = theirs(**inputs()).last_hidden_state
    real_BS = expected.real_BS
    torch.testing.assert_close(last_BSD[real_BS], expected.hidden_states[-1][real_BS], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_half_precision_names_of_classes_and_padding(tmp_path: Path) -> None:
    ours = build(**MODELS["hash, random"]).eval()
    said = {"labels": ("bad", "fair", "good"), "dtype": torch.bfloat16, "padding": 7}
    theirs = load(write(ours, tmp_path, MODELS["hash, random"], **said))
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    logits_BC = theirs(**inputs()).logits.double()
    torch.testing.assert_close(logits_BC, ours(*texts()).predictions[0], rtol=0.05, atol=0.05)
    assert theirs.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert theirs.config.pad_token_id == theirs.bert.embeddings.word_embeddings.padding_idx == 7


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model without experts is a plain BERT"):
        write(dense(), tmp_path, {"moe_every": 0})
    write(build(**MODELS["comet"]), tmp_path, MODELS["comet"])
    with pytest.raises(UserError, match=r"labels=\['bad', 'good'\]: the model has 3; name each of them"):
        write(build(**MODELS["comet"]), tmp_path / "few", MODELS["comet"], labels=("bad", "good"))
    with pytest.raises(UserError, match="exists already; name another directory"):
        write(build(**MODELS["comet"]), tmp_path, MODELS["comet"])
    mixture = json.loads((tmp_path / "config.json").read_text())["mixture"]
    reconfigure(tmp_path, mixture=mixture | {"gate": mixture["gate"] | {"k": 0}})
    with pytest.raises(UserError, match=r"the Hugging Face configuration cannot be followed: gate\.k"):
        load(tmp_path)
