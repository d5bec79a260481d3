"""Our BERT beside transformers': logits, hidden states and gradients in fp64, with padding and without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe import kernels
from dist_moe.data.encoder import open_encoder
from dist_moe.gates import HashRoutingConfig
from dist_moe.models import BertClassifier, BertClassifierConfig, RunShape
from dist_moe.models.bert import read_hugging_face
from dist_moe.models.bert.encoder import DenseFeedForward, ExpertFeedForward
from dist_moe.parallel import SingleWorld
from tests.helpers.berts import LENGTHS, SHAPE, assert_same_gradients, build, dense, mask_of, texts, twin_of
from tests.helpers.oracle import assert_same


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertClassifier, Any]:
    model = dense()
    return model, twin_of(model, tmp_path_factory.mktemp("twin"))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, (6, 6), (1,), (10, 2)], ids=str)
def test_values_and_gradients_equal_transformers(
    models: tuple[BertClassifier, Any], lengths: tuple[int, ...], pairs: bool
) -> None:
    model, twin = models
    token_BS, length_B = texts(lengths)
    segment_BS = torch.arange(token_BS.shape[1]).expand_as(token_BS) // 3 % 2 if pairs else None
    mask_BS = mask_of(token_BS, length_B)
    theirs = twin(token_BS, attention_mask=mask_BS, token_type_ids=segment_BS, output_hidden_states=True)
    ours = model(token_BS, length_B, segment_BS, hidden_states=True)
    (logits_BC,) = ours.predictions
    assert_same(logits_BC, theirs.logits)
    assert ours.layers == ()
    assert len(ours.hidden_states) == SHAPE.layers + 1
    for ours_BSD, theirs_BSD in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_same(ours_BSD, theirs_BSD * mask_BS.unsqueeze(2))
    cotangent_BC = torch.randn_like(logits_BC)
    model.zero_grad()
    twin.zero_grad()
    for logits in (logits_BC, theirs.logits):
        (logits * cotangent_BC).sum().backward()
    assert_same_gradients(model, twin)


def test_padding_changes_nothing_whatever_stands_there() -> None:
    model = dense()
    token_BS, length_B = texts()
    expected = model(token_BS, length_B, hidden_states=True)
    wide_BS = torch.nn.functional.pad(token_BS, (0, 3), value=7) + 30 * (1 - mask_of(torch.zeros(4, 10), length_B))
    actual = model(wide_BS, length_B, hidden_states=True)
    assert_same(actual.predictions[0], expected.predictions[0], 1e-13)
    for wide_BSD, narrow_BSD in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_same(wide_BSD[:, :-3], narrow_BSD, 1e-13)
        assert not wide_BSD[:, -3:].any()
        assert torch.equal(narrow_BSD.any(dim=2), expected.real_BS)


def test_no_text_at_all_gives_zero_gradients() -> None:
    model = dense()
    for width in (0, 5):
        output = model(torch.zeros(0, width, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), hidden_states=True)
        assert output.predictions[0].shape == (0, 3)
        assert output.hidden_states[-1].shape == (0, width, SHAPE.width)
        output.predictions[0].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def places_of_dropout(model: BertClassifier) -> dict[str, Any]:
    layer = model.encoder.layers[1]
    assert isinstance(layer.feed_forward, DenseFeedForward | ExpertFeedForward)
    places = {"embeddings": model.encoder.embeddings, "attention": layer.attention, "pooled": model}
    block = layer.feed_forward
    inside = isinstance(block, ExpertFeedForward) and block.norm is None
    return places | {"feed_forward": block.moe.experts if inside else block}


@pytest.mark.parametrize("options", [{"moe_every": 0}, {"expert_form": "block"}, {"expert_form": "network"}], ids=str)
def test_dropout_acts_at_every_place_and_in_training_only(options: dict[str, Any]) -> None:
    plain = build(gate=HashRoutingConfig(), **options)(*texts()).predictions[0]
    assert_same(build(gate=HashRoutingConfig(), dropout=0.3, **options).eval()(*texts()).predictions[0], plain)
    dropping = places_of_dropout(build(gate=HashRoutingConfig(), dropout=0.3, **options))
    assert {place.dropout for place in dropping.values()} == {0.3}
    for name in dropping:
        model = build(gate=HashRoutingConfig(), **options)
        places_of_dropout(model)[name].dropout = 0.3
        assert (model(*texts()).predictions[0] - plain).abs().max() > 1e-3, name


def test_dropout_of_attention_is_on_what_tokens_attend_to_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense(dropout=0.3)
    monkeypatch.setattr(kernels, "dropout", lambda x, probability, training: x)
    assert (model(*texts()).predictions[0] - dense()(*texts()).predictions[0]).abs().max() > 1e-3


def test_dropout_of_embeddings_drops_the_share_it_shall() -> None:
    output = dense(dropout=0.3)(*texts((10,) * 40), hidden_states=True)
    assert 0.28 < (output.hidden_states[0] == 0).double().mean() < 0.32


@pytest.mark.parametrize(("lengths", "named"), [([0, 2], r"\[0\]"), ([3, 9], r"\[9\]"), ([-1, 11], r"\[-1, 11\]")])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=rf"lengths must lie in 1\.\.8, got {named}"):
        dense()(torch.ones(2, 8, dtype=torch.int64), torch.tensor(lengths))


def test_texts_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="sequences of 11 tokens do not fit the encoder's 10 positions"):
        dense()(torch.ones(1, 11, dtype=torch.int64), torch.tensor([11]))


@pytest.mark.network
def test_minilm_gives_the_hidden_states_that_transformers_gives() -> None:
    from transformers import AutoModel, AutoTokenizer

    directory = open_encoder(progress=False).directory
    sentences = ["The cat sat on the mat.", "Yes", "Mixtures of experts route every token to few of many networks."]
    encoded = AutoTokenizer.from_pretrained(directory)(sentences, padding=True, return_tensors="pt")
    length_B = encoded["attention_mask"].sum(dim=1)
    checkpoint = read_hugging_face(directory)
    model = BertClassifierConfig(moe_every=0).build(checkpoint.shape, 2, RunShape(SingleWorld(), 1)).eval()
    checkpoint.into(model)
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(directory)(**encoded, output_hidden_states=True)
        ours = model(encoded["input_ids"], length_B, encoded["token_type_ids"], hidden_states=True)
    assert len(ours.hidden_states) == 7
    mask_BS1: Tensor = encoded["attention_mask"].unsqueeze(2)
    for ours_BSD, theirs_BSD in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert_same(ours_BSD, theirs_BSD * mask_BS1, 1e-5)
    assert_same(torch.tanh(model.pooler(ours.hidden_states[-1][:, 0])), theirs.pooler_output, 1e-5)
