"""The head that finds answers: transformers' BertForQuestionAnswering in fp64, padding, experts on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.engine.checkpoint import place_weights
from dist_moe.gates import CometConfig
from dist_moe.models import BertAnswerer
from dist_moe.parallel import EmulatedWorld, World
from tests.helpers.berts import LENGTHS, answerer, assert_same_gradients, mask_of, texts, twin_of
from tests.helpers.oracle import assert_all_same, assert_same, gradients
from tests.models.shares import joined

WITH_EXPERTS: dict[str, Any] = {"moe_every": 2, "gate": CometConfig(k=2, gamma=1.0)}


@pytest.mark.parametrize("lengths", [LENGTHS, (6, 6), (10, 2)], ids=str)
def test_logits_and_gradients_equal_transformers(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    model = answerer()
    twin = twin_of(model, tmp_path)
    token_BS, length_B = texts(lengths)
    real_BS = mask_of(token_BS, length_B).bool()
    segment_BS = torch.arange(token_BS.shape[1]).expand_as(token_BS) // 3 % 2
    theirs = twin(token_BS, attention_mask=real_BS.long(), token_type_ids=segment_BS)
    ours = model(token_BS, length_B, segment_BS)
    losses = []
    for predictions in (ours.predictions, (theirs.start_logits, theirs.end_logits)):
        cotangents = torch.randn(2, *real_BS.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        losses.append(sum((x[real_BS] * c[real_BS]).sum() for x, c in zip(predictions, cotangents, strict=True)))
    for mine_BS, theirs_BS in zip(ours.predictions, (theirs.start_logits, theirs.end_logits), strict=True):
        assert_same(mine_BS[real_BS], theirs_BS[real_BS])
    for loss in losses:
        assert isinstance(loss, Tensor)
        loss.backward()
    assert_same_gradients(model, twin)


def test_padding_is_no_place_for_an_answer() -> None:
    model = answerer(**WITH_EXPERTS)
    token_BS, length_B = texts()
    narrow = model(token_BS, length_B)
    wide = model(torch.nn.functional.pad(token_BS, (0, 3), value=7), length_B)
    for narrow_BS, wide_BS in zip(narrow.predictions, wide.predictions, strict=True):
        share_BS = wide_BS.softmax(1)
        assert torch.equal(share_BS[:, :-3] > 0, narrow.real_BS)
        assert not share_BS[:, -3:].any()
        assert_same(share_BS[:, :-3], narrow_BS.softmax(1), 1e-13)
        assert wide_BS.isfinite().all()


def test_no_window_at_all_gives_zero_gradients() -> None:
    model = answerer()
    output = model(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert [x.shape for x in output.predictions] == [(0, 5), (0, 5)]
    torch.stack(output.predictions).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_two_ranks_equal_one_process() -> None:
    whole = answerer(**WITH_EXPERTS)

    def loss_of(model: BertAnswerer, rows: slice) -> Tensor:
        token_BS, length_B = texts()
        output = model(token_BS[rows], length_B[rows])
        return sum((x[output.real_BS].sin().sum() for x in output.predictions), torch.zeros(()))

    def run(world: World) -> dict[str, Tensor]:
        share = answerer(world, **WITH_EXPERTS)
        place_weights(share, dict(whole.named_parameters()))
        rows = slice(0, 1) if world.rank == 0 else slice(1, None)
        return gradients(loss_of(share, rows), dict(share.named_parameters()))

    expected = gradients(loss_of(whole, slice(None)), dict(whole.named_parameters()))
    assert_all_same(joined(EmulatedWorld(2).run(run)), expected)
    assert expected["encoder.layers.1.feed_forward.moe.experts.down"].any()
