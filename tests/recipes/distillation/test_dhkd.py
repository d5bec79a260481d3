"""DHKD's losses: identities, gradients, far logits; and two heads that do not reach into one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_moe.parallel import SingleWorld
from dist_moe.recipes.distillation import DHKDConfig, binary_kl, binary_kl_norm
from dist_moe.recipes.distillation.dhkd import log_cosh
from dist_moe.tasks.objective import WeightedObjective
from tests.helpers.students import Labels, Oracle, Student, auxiliary_terms, step_of_examples

BATCH, CLASSES = 5, 4


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(BATCH, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of two outcomes, term by term."""
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_check_g1_binary_kl_norm_is_log_cosh_of_the_difference(temperature: float) -> None:
    s, t = logits(0).requires_grad_(), logits(1)
    loss = binary_kl_norm(s, t, temperature, BATCH)
    by_definition = divergence(torch.full_like(s, 0.5), ((s - t) / temperature).sigmoid())
    assert loss.item() == pytest.approx(temperature**2 * by_definition.sum().item() / BATCH, rel=1e-9)
    identity = ((s - t) / (2 * temperature)).cosh().log()
    assert loss.item() == pytest.approx(temperature**2 * identity.sum().item() / BATCH, rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, s)
    wanted = temperature / (2 * BATCH) * ((s - t) / (2 * temperature)).tanh()
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)
    assert binary_kl_norm(t, s, temperature, BATCH).item() == pytest.approx(loss.item(), rel=1e-12)


def test_check_g1_it_is_zero_for_equal_logits_only() -> None:
    t = logits(1)
    assert binary_kl_norm(t.clone(), t, 2.0, BATCH).item() == 0
    for difference in (1e-3, 1e-8, -1e-8):  # where 1 + x^2 is 1
        near = t.clone()
        near[0, 0] += difference
        delta = float(near[0, 0] - t[0, 0])
        assert binary_kl_norm(near, t, 2.0, 1).item() == pytest.approx(delta**2 / 8, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_check_g1_far_logits_neither_overflow_nor_lose_their_gradient(dtype: torch.dtype) -> None:
    far = torch.tensor([[1e4, -1e4, 1.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 1.0, 1e4]], dtype=dtype)
    norm, binary = (function(far, teacher, 2.0, 1) for function in (binary_kl_norm, binary_kl))
    wide, theirs = far.detach().double(), teacher.double()
    sizes = ((wide - theirs) / 4).abs()
    wanted = 4 * (sizes - torch.log(torch.tensor(2.0)).double() * (sizes > 0)).sum()
    assert norm.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    (gradient,) = torch.autograd.grad(norm, far)
    assert gradient[0].tolist() == pytest.approx([1.0, -1.0, 0.0, -1.0], abs=1e-6)
    (gradient,) = torch.autograd.grad(binary, far)
    assert gradient[0].tolist() == pytest.approx([2.0, -2.0, 0.0, -1.0], abs=1e-6)
    assert bool(binary.isfinite())


def test_log_cosh_joins_its_two_forms_smoothly() -> None:
    x = torch.linspace(-1.01, 1.01, 4001, dtype=torch.float64, requires_grad=True)
    value = log_cosh(x)
    torch.testing.assert_close(value, x.cosh().log(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], x.tanh(), rtol=0, atol=1e-14)


def test_binary_kl_is_the_divergence_of_two_outcomes_per_class() -> None:
    temperature, s, t = 2.0, logits(0).requires_grad_(), logits(1)
    loss = binary_kl(s, t, temperature, BATCH)
    p, q = (t / temperature).sigmoid(), (s / temperature).sigmoid()
    assert loss.item() == pytest.approx(temperature**2 * divergence(p, q).sum().item() / BATCH, rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, s)
    torch.testing.assert_close(gradient, temperature * (q - p).detach() / BATCH, rtol=0, atol=1e-12)
    assert binary_kl(t, t, temperature, BATCH).item() == 0


@pytest.mark.parametrize("loss", [binary_kl, binary_kl_norm])
def test_check_g3_a_constant_added_to_all_logits_of_the_teacher_is_seen(loss: Any) -> None:
    s = t = logits(1)

    def softmax_kd(teacher: Tensor) -> float:
        return F.kl_div(s.log_softmax(1), teacher.softmax(1), reduction="batchmean").item()

    assert loss(s, t, 2.0, BATCH) == 0
    assert loss(s, t + 1, 2.0, BATCH) > 0.1
    assert softmax_kd(t + 1) == pytest.approx(softmax_kd(t), abs=1e-12)


def gradients_of(student: Student, loss: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*student.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True), strict=True))


@pytest.mark.parametrize("auxiliary", ["linear", "mlp"])
def test_check_g2_each_loss_reaches_its_own_head_and_both_reach_the_backbone(auxiliary: Any) -> None:
    student, batch = Student(SingleWorld(), auxiliary).train(), step_of_examples(0)
    output = student(batch.x_BD)
    plain = WeightedObjective(Labels(), (1.0,), 1).of_output(output, batch).loss
    taught_BC = Oracle(3.0)(batch.x_BD).detach()
    teachers = auxiliary_terms(DHKDConfig())(output, taught_BC, batch)["dhkd"]
    of_labels, of_teacher = gradients_of(student, plain), gradients_of(student, teachers)
    for name in of_labels:
        head = name.startswith(("head.main", "head.auxiliary"))
        for found, stranger in ((of_labels, "head.auxiliary"), (of_teacher, "head.main")):
            gradient = found[name]
            if name.startswith(stranger):
                assert gradient is None
            elif head or name.startswith(("below", "moe.experts")):
                assert gradient is not None
                # what is normalised next has no mean, so the first layer's bias of an mlp has no gradient
                assert gradient.abs().max() > (0 if name == "head.auxiliary.0.bias" else 1e-6), name


def test_in_a_single_head_they_would_meet() -> None:
    """The control of the test above: both losses on one head pull at the same weights."""
    student, batch = Student(SingleWorld(), None).train(), step_of_examples(0)
    logit_BC = student(batch.x_BD).predictions[0]
    labels = F.cross_entropy(logit_BC, batch.label_B)
    teachers = binary_kl_norm(logit_BC, Oracle(-3.0)(batch.x_BD).detach(), 2.0, len(logit_BC))
    both = [gradients_of(student, loss)["head.main.weight"] for loss in (labels, teachers)]
    assert both[0] is not None
    assert both[1] is not None
    assert (both[0] * both[1]).sum() < 0


def test_config_weighs_by_alpha_and_divides_by_the_temperature() -> None:
    config = DHKDConfig(weight=0.1, temperature=4.0)
    wanted = 0.1 * binary_kl_norm(logits(0), logits(1), 4.0, BATCH)
    assert config.loss(logits(0), logits(1), BATCH).item() == pytest.approx(wanted.item(), rel=1e-12)
