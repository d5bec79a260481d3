"""Loss and selection of answers beside loops in fp64, and beside transformers' BertForQuestionAnswering."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_moe.models.bert.hugging_face import name_map
from dist_moe.tasks.labelled_text.answer_spans import NO_WINDOW, answering_windows, best_spans, span_losses
from tests.helpers.berts import SHAPE, answerer, texts, twin_of
from tests.helpers.oracle import assert_same

BATCH, LENGTH = 6, 9


def logits(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, end = (torch.randn(BATCH, LENGTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return start, end


def texts_of_windows() -> Tensor:
    """Tokens of the text: some, one, none, all but the first."""
    position_S = torch.arange(LENGTH)
    ends = [(3, 8), (2, 7), (4, 5), (5, 5), (1, 9), (6, 9)]
    return torch.stack([(position_S >= begin) & (position_S < end) for begin, end in ends])


def test_the_loss_is_the_mean_of_both_ends_cross_entropies() -> None:
    start_BS, end_BS = logits(0)
    span_B2 = torch.tensor([[0, 0], [2, 5], [8, 8], [1, 0], [4, 4], [3, 7]])
    expected = []
    for start_S, end_S, (first, last) in zip(start_BS.tolist(), end_BS.tolist(), span_B2.tolist(), strict=True):
        surprise = [math.log(sum(map(math.exp, row))) - row[i] for row, i in ((start_S, first), (end_S, last))]
        expected.append(sum(surprise) / 2)
    assert span_losses(start_BS, end_BS, span_B2).tolist() == pytest.approx(expected, rel=1e-13)


def test_loss_and_gradients_equal_transformers(tmp_path: Path) -> None:
    """Rows of one length: with padding, transformers lets an answer start there."""
    model = answerer()
    twin = twin_of(model, tmp_path)
    token_BS, length_B = texts((8, 8, 8))
    span_B2 = torch.tensor([[0, 0], [2, 5], [7, 7]])
    theirs = twin(token_BS, start_positions=span_B2[:, 0], end_positions=span_B2[:, 1]).loss
    start_BS, end_BS = model(token_BS, length_B).predictions
    ours = span_losses(start_BS, end_BS, span_B2).mean()
    assert_same(ours, theirs)
    ours.backward()
    theirs.backward()
    names = name_map(SHAPE.layers)
    for name, parameter in model.named_parameters():
        twin_name = names[name] if name.startswith("span") else f"bert.{names[name]}"
        assert_same(parameter.grad, twin.get_parameter(twin_name).grad, name=name)


@pytest.mark.parametrize("longest", [1, 2, 4, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_span_of_a_window_by_a_loop(longest: int, seed: int) -> None:
    start_BS, end_BS = logits(seed)
    text_BS = texts_of_windows()
    score_B, first_B, last_B = best_spans(start_BS, end_BS, text_BS, longest)
    for row in range(BATCH):
        spans = [
            (float(start_BS[row, i] + end_BS[row, j]), i, j)
            for i in range(LENGTH)
            for j in range(i, min(i + longest, LENGTH))
            if text_BS[row, i] and text_BS[row, j]
        ]
        found = (float(score_B[row]), int(first_B[row]), int(last_B[row]))
        if spans:
            assert found == max(spans)
        else:
            assert found[0] == -math.inf
    assert best_spans(start_BS[:0], end_BS[:0], text_BS[:0], longest)[0].shape == (0,)


def test_of_equal_spans_the_shorter_wins() -> None:
    zeros, text_BS = torch.zeros(1, LENGTH), texts_of_windows()[:1]
    score_B, first_B, last_B = best_spans(zeros, zeros, text_BS, 30)
    assert (score_B.item(), int(last_B - first_B)) == (0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_answer_to_a_question_by_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    question_N = np.repeat(np.arange(7), rng.integers(1, 5, size=7))
    none_N, score_N = (rng.normal(size=len(question_N)) for _ in range(2))
    score_N[question_N == 3] = -np.inf
    expected = []
    for question in range(7):
        windows = [n for n in range(len(question_N)) if question_N[n] == question]
        best = max(windows, key=lambda n: score_N[n])
        expected.append(NO_WINDOW if min(none_N[n] for n in windows) - score_N[best] > 0 else best)
    assert answering_windows(question_N, none_N, score_N).tolist() == expected
    assert NO_WINDOW in expected
    assert max(expected) >= 0


def test_at_the_threshold_a_span_wins_and_of_equal_windows_the_first() -> None:
    question_N = np.array([0, 0, 0, 1])
    answers = answering_windows(question_N, np.array([3.0, 2.0, 9.0, 1.0]), np.array([1.0, 2.0, 2.0, 0.5]))
    assert answers.tolist() == [1, NO_WINDOW]
