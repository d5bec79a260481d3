"""Following a teacher's predictions of any task: values and gradients against loops, in any split of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.recipes.distillation import FollowConfig, follow, softened_kl
from dist_moe.tasks.task import PredictionKind

EXAMPLES, POSITIONS, CLASSES = 6, 3, 5

SHAPES: list[tuple[PredictionKind, tuple[int, ...]]] = [
    ("classes", (CLASSES,)),
    ("classes", (POSITIONS, CLASSES)),
    ("binary", ()),
    ("number", ()),
    ("number", (1,)),
]


def pair_of(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(EXAMPLES, *shape, generator=generator, dtype=torch.double) for _ in range(2))
    return student.requires_grad_(), teacher


def softmax(logits: list[float]) -> list[float]:
    return [math.exp(x) / sum(map(math.exp, logits)) for x in logits]


def distance_and_slopes(
    kind: PredictionKind, student: list[float], teacher: list[float], t: float
) -> tuple[float, list[float]]:
    """Of one position, by the formulas of the module: its distance and what it changes by with each number."""
    if kind == "number":
        return (student[0] - teacher[0]) ** 2, [2 * (student[0] - teacher[0])]
    if kind == "binary":
        value, slopes = distance_and_slopes("classes", [student[0], 0.0], [teacher[0], 0.0], t)
        return value, slopes[:1]
    p, q = softmax([x / t for x in student]), softmax([x / t for x in teacher])
    value = t**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    return value, [t * (a - b) for a, b in zip(p, q, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize(("kind", "shape"), SHAPES)
def test_values_and_gradients_are_those_of_a_loop(
    kind: PredictionKind, shape: tuple[int, ...], temperature: float
) -> None:
    student, teacher = pair_of(shape)
    value = follow(kind, student, teacher, temperature, EXAMPLES)
    (slope,) = torch.autograd.grad(value, student)
    width = shape[-1] if kind == "classes" else 1
    rows = [x.detach().reshape(-1, width).tolist() for x in (student, teacher)]
    each = [distance_and_slopes(kind, *row, temperature) for row in zip(*rows, strict=True)]
    assert value.item() == pytest.approx(sum(one for one, _ in each) / len(each), rel=1e-12)
    expected = torch.tensor([slopes for _, slopes in each], dtype=torch.double).view_as(slope) / len(each)
    torch.testing.assert_close(slope, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
def test_shares_of_a_step_add_up_even_where_one_is_empty(kind: PredictionKind, shape: tuple[int, ...]) -> None:
    student, teacher = pair_of(shape)
    whole = follow(kind, student, teacher, 2.0, EXAMPLES)
    bounds = [(0, 1), (1, 1), (1, 4), (4, EXAMPLES)]
    parts = [follow(kind, student[a:b], teacher[a:b], 2.0, EXAMPLES) for a, b in bounds]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-12, atol=0)
    assert parts[1].item() == 0


def test_equal_predictions_are_followed_and_no_gradient_is_left() -> None:
    for kind, shape in SHAPES:
        student, _ = pair_of(shape)
        value = follow(kind, student, student.detach().clone(), 2.0, EXAMPLES)
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert torch.autograd.grad(value, student)[0].abs().max() < 1e-12


@pytest.mark.parametrize("least", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_classes_that_there_are_not_count_for_nothing(least: float, temperature: float) -> None:
    """Padding among the positions of an answer: neither a nan nor another value."""
    student, teacher = (x.detach().float() for x in pair_of((CLASSES,)))
    student.requires_grad_()
    padding = torch.full((EXAMPLES, 2), least)
    padded = softened_kl(torch.cat([student, padding], 1), torch.cat([teacher, padding], 1), temperature, EXAMPLES)
    plain = softened_kl(student, teacher, temperature, EXAMPLES)
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(torch.autograd.grad(padded, student), torch.autograd.grad(plain, student))


@dataclass
class Output:
    predictions: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...] = ()
    real_BS: Tensor | None = None


def test_each_target_counts_with_its_weight_and_the_mean_of_its_predictions() -> None:
    (ours, theirs), (other, taught) = pair_of((CLASSES,)), pair_of((CLASSES,), seed=1)
    student, teacher = Output((ours, other)), Output((theirs, taught))
    batch: Any = SimpleNamespace(examples_in_step=EXAMPLES, tokens_in_step=EXAMPLES)
    config = FollowConfig(weight=0.3, temperature=3.0)
    first, second = (follow("classes", *pair, 3.0, EXAMPLES) for pair in ((ours, theirs), (other, taught)))
    terms = config.terms(("classes", "classes"), {"a": 0.25, "b": 2.0})(student, teacher, batch)
    assert terms.keys() == {"teacher_a", "teacher_b"}
    torch.testing.assert_close(terms["teacher_a"], 0.3 * 0.25 * first)
    torch.testing.assert_close(terms["teacher_b"], 0.3 * 2 * second)
    (span,) = config.terms(("classes", "classes"), {"span": 2.0})(student, teacher, batch).values()
    torch.testing.assert_close(span, 0.3 * 2 * (first + second) / 2)


def test_hidden_states_follow_where_they_are_asked_for() -> None:
    assert FollowConfig().ask == {}
    config = FollowConfig(hidden_weight=0.5)
    assert config.ask == {"hidden_states": True}
    predictions = (torch.zeros(2, CLASSES),)
    states = torch.randn(2, POSITIONS, 4)
    real = torch.tensor([[True, True, False], [True, False, False]])
    batch: Any = SimpleNamespace(examples_in_step=2, tokens_in_step=3)
    student = Output(predictions, (states,), real)
    terms = config.terms(("classes",), {"a": 1.0})(student, Output(predictions, (states + 2.0,), real), batch)
    torch.testing.assert_close(terms["teacher_hidden"], torch.tensor(0.5 * 4))
