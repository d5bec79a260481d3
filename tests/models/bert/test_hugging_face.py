"""Hugging Face directories there and back: bit-equal, and every tensor accounted for by count and by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_moe.data.encoder import open_encoder
from dist_moe.errors import UserError
from dist_moe.models import BertAnswererConfig, BertClassifier, BertClassifierConfig, BertShape, RunShape
from dist_moe.models.bert import read_hugging_face, read_shape, write_hugging_face
from dist_moe.models.bert.hugging_face import name_map
from dist_moe.parallel import SingleWorld
from tests.helpers.berts import NUM_LABELS, SHAPE, answerer, build, dense
from tests.models.hugging_face.directories import Tensors, assert_same_directories, reconfigure, rewrite


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_hugging_face(dense(), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def without_prefix(tensors: Tensors) -> Tensors:
    """As BertModel writes: no prefix, no classifier; the constant that older versions kept."""
    kept = {name.removeprefix("bert."): t for name, t in tensors.items() if not name.startswith("classifier")}
    return kept | {"embeddings.position_ids": torch.arange(SHAPE.positions).unsqueeze(0)}


def fresh(shape: BertShape = SHAPE, num_labels: int = NUM_LABELS) -> BertClassifier:
    torch.manual_seed(99)
    return BertClassifierConfig(moe_every=0).build(shape, num_labels, RunShape(SingleWorld(), 1)).double()


def test_every_parameter_has_one_name_on_either_side() -> None:
    names = name_map(SHAPE.layers)
    assert names.keys() == {name for model in (dense(), answerer()) for name, _ in model.named_parameters()}
    assert len(set(names.values())) == len(names) == 5 + 16 * SHAPE.layers + 4 + 2


@pytest.mark.parametrize("change", [dict, without_prefix], ids=["classifier", "encoder"])
def test_there_and_back_is_equal_to_the_bit(
    directory: Path, tmp_path: Path, change: Callable[[Tensors], Tensors]
) -> None:
    original = rewrite(directory, change)
    checkpoint = read_hugging_face(original)
    model = fresh()
    checkpoint.into(model)
    write_hugging_face(model, tmp_path / "again", like=checkpoint)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (original / name).read_bytes()
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in checkpoint.weights.items())
    assert checkpoint.shape == read_shape(original) == SHAPE
    assert checkpoint.left_out == ()


def test_the_oldest_names_and_heads_of_pre_training_are_understood(directory: Path) -> None:
    def age(tensors: Tensors) -> Tensors:
        old = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()
            if not name.startswith("classifier")
        }
        return old | {"cls.predictions.bias": torch.zeros(3), "cls.seq_relationship.weight": torch.zeros(2, 12)}

    expected = read_hugging_face(directory).weights
    checkpoint = read_hugging_face(rewrite(directory, age))
    assert checkpoint.left_out == ("cls.predictions.bias", "cls.seq_relationship.weight")
    assert not any(name.startswith("classifier.") for name in checkpoint.weights)
    model = fresh()
    before = model.classifier.weight.clone()
    checkpoint.into(model)
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(
        model.encoder.layers[1].attention.norm.weight, expected["encoder.layers.1.attention.norm.weight"]
    )


def test_missing_and_unknown_tensors_are_named(directory: Path) -> None:
    def damage(tensors: Tensors) -> Tensors:
        query = tensors.pop("bert.encoder.layer.1.attention.self.query.weight")
        return tensors | {"bert.encoder.layer.1.attention.self.qury.weight": query}

    with pytest.raises(UserError) as error:
        read_hugging_face(rewrite(directory, damage))
    message = str(error.value)
    assert "missing: encoder.layer.1.attention.self.query.weight" in message
    assert "unknown: encoder.layer.1.attention.self.qury.weight" in message
    assert "has 57 tensors, a BERT encoder with what stands above it has 57" in message


def test_the_head_of_an_answerer_comes_and_goes(tmp_path: Path) -> None:
    """No pooler, as in BertForQuestionAnswering; a classifier's weights give it their encoder alone."""
    write_hugging_face(answerer(), tmp_path / "answers")
    checkpoint = read_hugging_face(tmp_path / "answers")
    model = BertAnswererConfig(moe_every=0).build(SHAPE, RunShape(SingleWorld(), 1)).double()
    drawn = model.span.weight.clone()
    write_hugging_face(dense(), tmp_path / "classes")
    read_hugging_face(tmp_path / "classes").into(model)
    assert torch.equal(model.span.weight, drawn)
    assert torch.equal(model.encoder.layers[2].feed_forward.up.weight, dense().encoder.layers[2].feed_forward.up.weight)
    checkpoint.into(model)
    assert torch.equal(model.span.weight, answerer().span.weight)
    write_hugging_face(model, tmp_path / "again", like=checkpoint)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "answers" / name).read_bytes()
    classifier = fresh()
    pooler = classifier.pooler.weight.clone()
    checkpoint.into(classifier)
    assert torch.equal(classifier.pooler.weight, pooler)
    assert torch.equal(classifier.encoder.embeddings.token.weight, answerer().encoder.embeddings.token.weight)


def test_a_head_is_not_lost_in_the_layout_of_another(tmp_path: Path) -> None:
    for name, model, other in (("classes", dense(), answerer()), ("answers", answerer(), dense())):
        write_hugging_face(model, tmp_path / name)
        with pytest.raises(UserError, match=rf"the model's head is {other.head}\*, that of like is {model.head}\*"):
            write_hugging_face(other, tmp_path / "other", like=read_hugging_face(tmp_path / name))


def test_half_a_classifier_and_positions_that_are_not_counted_up_are_refused(directory: Path) -> None:
    flipped = {"bert.embeddings.position_ids": torch.arange(SHAPE.positions).flip(0).unsqueeze(0)}
    with pytest.raises(UserError, match=r"position_ids is not 0\.\.9"):
        read_hugging_face(rewrite(directory, lambda tensors: tensors | flipped))
    lost = {"classifier.bias", *flipped}
    with pytest.raises(UserError, match=r"missing: classifier\.bias"):
        read_hugging_face(rewrite(directory, lambda tensors: {n: t for n, t in tensors.items() if n not in lost}))


def test_another_number_of_labels_is_named_and_nothing_is_changed(directory: Path) -> None:
    model = fresh(num_labels=5)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=r"classifier\.weight has shape \(3, 12\), the model's is \(5, 12\)"):
        read_hugging_face(directory).into(model)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "roberta"}, "model_type='roberta': only BERT encoders"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ({"is_decoder": True}, "is_decoder=True"),
        ({"hidden_act": "gelu_new"}, r"hidden_act='gelu_new' is not known; allowed: \['gelu', 'relu', 'silu'"),
        ({"num_attention_heads": 5}, "hidden_size=12 is no multiple of num_attention_heads=5"),
    ],
)
def test_other_models_are_refused(directory: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_hugging_face(reconfigure(directory, **fields))


def test_a_directory_that_is_no_checkpoint_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_hugging_face(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"is not there \(other weights: pytorch_model\.bin\)\. Remedy: load"):
        read_hugging_face(directory)
    (directory / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        read_hugging_face(directory)


def test_weights_are_not_overwritten_and_experts_not_written(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already; name another directory"):
        write_hugging_face(dense(), directory)
    with pytest.raises(UserError, match="a model with experts is no BertModel"):
        write_hugging_face(build(moe_every=2), tmp_path / "experts")


@pytest.mark.network
def test_minilm_comes_back_as_the_same_file(tmp_path: Path) -> None:
    source = open_encoder(progress=False).directory
    checkpoint = read_hugging_face(source)
    assert checkpoint.shape == BertShape(vocab=30_522, width=384, layers=6, heads=12, hidden=1536)
    model = fresh(checkpoint.shape, 2).float()
    checkpoint.into(model)
    write_hugging_face(model, tmp_path / "minilm", like=checkpoint)
    assert len(assert_same_directories(source, tmp_path / "minilm")) == 5 + 16 * 6 + 2 + checkpoint.has_position_ids
    digests = [
        hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() for path in (source, tmp_path / "minilm")
    ]
    assert digests[0] == digests[1]
