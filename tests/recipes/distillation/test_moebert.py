"""Hidden states and predictions that follow a teacher's: means over real positions, whatever the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dist_moe.recipes.distillation import MoEBERTConfig, hidden_mse, prediction_mse, symmetric_kl

LAYERS, BATCH, LENGTH, WIDTH, CLASSES = 3, 4, 5, 6, 7


def hidden_states(seed: int) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, LENGTH, WIDTH, generator=drawn) for _ in range(LAYERS)]


def real_positions() -> Tensor:
    """Examples of 5, 3, 1 and 4 tokens."""
    return torch.arange(LENGTH) < torch.tensor([5, 3, 1, 4]).unsqueeze(1)


def test_hidden_states_differ_by_the_mean_over_real_positions_and_units_summed_over_layers() -> None:
    ours, theirs, real_BL = hidden_states(0), hidden_states(1), real_positions()
    wanted = 0.0
    for student, teacher in zip(ours, theirs, strict=True):
        squares = [
            float((student[b, i, d] - teacher[b, i, d]) ** 2)
            for b in range(BATCH)
            for i in range(LENGTH)
            for d in range(WIDTH)
            if real_BL[b, i]
        ]
        wanted += sum(squares) / len(squares)
    assert hidden_mse(ours, theirs, int(real_BL.sum()), real_BL).item() == pytest.approx(wanted, rel=1e-6)


def test_padding_counts_only_as_the_authors_have_it() -> None:
    """Without a mask it is torch's own mean over all elements; with one, padding may hold anything."""
    ours, theirs, real_BL = hidden_states(0), hidden_states(1), real_positions()
    released = sum(torch.nn.functional.mse_loss(s, t).item() for s, t in zip(ours, theirs, strict=True))
    assert hidden_mse(ours, theirs, BATCH * LENGTH).item() == pytest.approx(released, rel=1e-6)
    masked = hidden_mse(ours, theirs, int(real_BL.sum()), real_BL)
    spoilt = [torch.where(real_BL.unsqueeze(2), state, math.nan).requires_grad_() for state in ours]
    loss = hidden_mse(spoilt, theirs, int(real_BL.sum()), real_BL)
    assert loss.item() == masked.item() != pytest.approx(released, rel=1e-3)
    loss.backward()
    for state in spoilt:
        assert state.grad is not None
        assert not state.grad[~real_BL].any()
        assert bool((state.grad[real_BL] != 0).all())


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """Parts of unequal numbers of tokens: a mean of their means would be another number."""
    ours, theirs, real_BL = hidden_states(0), hidden_states(1), real_positions()
    positions = int(real_BL.sum())
    logit_BC, taught_BC = ours[0][:, 0], theirs[0][:, 0]
    parts = [slice(0, 1), slice(1, 3), slice(3, 4)]

    def rows(states: list[Tensor], part: slice) -> list[Tensor]:
        return [state[part] for state in states]

    of_parts = [hidden_mse(rows(ours, p), rows(theirs, p), positions, real_BL[p]) for p in parts]
    assert sum(of_parts).item() == pytest.approx(hidden_mse(ours, theirs, positions, real_BL).item(), rel=1e-6)
    kl = [symmetric_kl(logit_BC[p], taught_BC[p], BATCH) for p in parts]
    assert sum(kl).item() == pytest.approx(symmetric_kl(logit_BC, taught_BC, BATCH).item(), rel=1e-6)
    mse = [prediction_mse(logit_BC[p, 0], taught_BC[p, 0], BATCH) for p in parts]
    assert sum(mse).item() == pytest.approx(((logit_BC[:, 0] - taught_BC[:, 0]) ** 2).mean().item(), rel=1e-6)


def test_a_part_without_examples_gives_zero_and_a_gradient() -> None:
    empty = torch.zeros(0, LENGTH, WIDTH, requires_grad=True)
    loss = hidden_mse([empty], [empty.detach()], 10) + symmetric_kl(empty[:, 0], empty[:, 0].detach(), 10)
    loss.backward()
    assert loss.item() == 0
    assert empty.grad is not None


def test_symmetric_kl_is_half_of_both_directions_per_example() -> None:
    logit_BC, taught_BC = (state[:, 0].double() for state in (hidden_states(0)[0], hidden_states(1)[0]))
    p, q = logit_BC.softmax(1), taught_BC.softmax(1)
    wanted = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / BATCH
    assert symmetric_kl(logit_BC, taught_BC, BATCH).item() == pytest.approx(wanted.item(), rel=1e-12)
    exchanged = symmetric_kl(taught_BC, logit_BC, BATCH)
    assert exchanged.item() == pytest.approx(wanted.item(), rel=1e-12)
    released = 0.5 * sum(
        torch.nn.functional.kl_div(one.log_softmax(1), other.softmax(1), reduction="batchmean")
        for one, other in ((logit_BC, taught_BC), (taught_BC, logit_BC))
    )
    assert wanted.item() == pytest.approx(float(released), rel=1e-12)


def test_symmetric_kl_knows_only_distributions_and_stands_far_logits() -> None:
    logit_BC = hidden_states(0)[0][:, 0]
    assert symmetric_kl(logit_BC, logit_BC.clone(), BATCH).item() == 0
    assert symmetric_kl(logit_BC, logit_BC + 3, BATCH).item() == pytest.approx(0, abs=1e-6)
    far_BC = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = symmetric_kl(far_BC, far_BC.detach().flip(0), 2)
    assert loss.item() == pytest.approx(2e4)
    loss.backward()
    assert far_BC.grad is not None
    assert bool(far_BC.grad.isfinite().all())


def test_positions_that_do_not_count_give_no_divergence() -> None:
    ours, theirs, real_BL = hidden_states(0)[0], hidden_states(1)[0], real_positions()
    counted = symmetric_kl(ours[real_BL], theirs[real_BL], int(real_BL.sum()))
    assert symmetric_kl(ours, theirs, int(real_BL.sum()), real_BL).item() == pytest.approx(counted.item(), rel=1e-6)


def test_check_h4_all_terms_are_zero_where_the_student_is_the_teacher() -> None:
    states, real_BL = hidden_states(0), real_positions()
    assert hidden_mse(states, states, int(real_BL.sum()), real_BL).item() == 0
    assert symmetric_kl(states[0], states[0], BATCH).item() == 0
    assert prediction_mse(states[0][:, 0, 0], states[0][:, 0, 0], BATCH).item() == 0


@dataclass(frozen=True)
class Output:
    """What a model gives, or a batch says."""

    predictions: tuple[Tensor, ...]
    hidden_states: list[Tensor]
    real_BS: Tensor
    tokens_in_step: int = 20
    examples_in_step: int = 8


def test_terms_are_weighted_and_divided_by_the_tokens_and_the_examples_of_the_step() -> None:
    student, teacher = (
        Output((states[0][:, 0], states[1][:, 0], states[2][:, 0, :1]), states, real_positions())
        for states in (hidden_states(0), hidden_states(1))
    )
    terms = MoEBERTConfig(weight=3.0).terms(student, teacher, student)
    hidden = hidden_mse(student.hidden_states, teacher.hidden_states, 20, real_positions())
    assert terms["hidden"].item() == pytest.approx(3 * hidden.item())
    start, end, score = zip(student.predictions, teacher.predictions, strict=True)
    of_each = [symmetric_kl(*start, 8), symmetric_kl(*end, 8), prediction_mse(*score, 8)]
    assert terms["prediction"].item() == pytest.approx(sum(x.item() for x in of_each))
    assert min(x.item() for x in of_each) > 0


def test_losses_of_bf16_are_computed_in_fp32() -> None:
    ours, theirs = ([state.bfloat16() for state in hidden_states(seed)] for seed in (0, 1))
    for loss in (hidden_mse(ours, theirs, 20), symmetric_kl(ours[0], theirs[0], BATCH)):
        assert loss.dtype == torch.float32
    wide = hidden_mse([s.double() for s in ours], [t.double() for t in theirs], 20)
    assert hidden_mse(ours, theirs, 20).item() == pytest.approx(wide.item(), rel=1e-5)


def test_states_that_do_not_correspond_are_refused() -> None:
    with pytest.raises(ValueError, match="3 hidden states of the student cannot follow 2"):
        hidden_mse(hidden_states(0), hidden_states(1)[:2], 20)
    with pytest.raises(ValueError, match=r"hidden state 1 is \(4, 5, 6\), but \(4, 5, 3\)"):
        hidden_mse(hidden_states(0)[:2], [hidden_states(1)[0], hidden_states(1)[1][..., :3]], 20)
