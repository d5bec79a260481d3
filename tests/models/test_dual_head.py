"""Two heads over one feature: the auxiliary one leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_moe.models.dual_head import DROPOUT, HIDDEN_UNITS
from dist_moe.parallel import SingleWorld
from tests.helpers.students import DualHead, Student, step_of_examples

DIM, CLASSES = 6, 3


def build(auxiliary: Any) -> DualHead:
    torch.manual_seed(0)
    return DualHead(DIM, CLASSES, auxiliary)


@pytest.mark.parametrize("auxiliary", ["linear", "mlp"])
def test_check_g6_without_the_auxiliary_head_logits_are_bit_equal_and_parameters_the_plain_students(
    auxiliary: Any,
) -> None:
    student, plain, batch = Student(SingleWorld(), auxiliary), Student(SingleWorld(), None), step_of_examples(0)
    with_head = student(batch.x_BD).predictions[0]
    assert student(batch.x_BD).auxiliary_BC is not None
    student.head.auxiliary = None
    output = student(batch.x_BD)
    assert output.auxiliary_BC is None
    assert torch.equal(output.predictions[0], with_head)
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in plain.parameters())
    assert student.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(student.state_dict())
    assert torch.equal(plain(batch.x_BD).predictions[0], with_head)


def test_it_is_not_computed_in_evaluation() -> None:
    head, x_BD = build("mlp").eval(), torch.randn(4, DIM)
    head.auxiliary = nn.Module().eval()  # which cannot be called
    logit_BC, auxiliary_BC = head(x_BD)
    assert auxiliary_BC is None
    assert torch.equal(logit_BC, head.main(x_BD))


@pytest.mark.parametrize("auxiliary", ["linear", "mlp"])
def test_its_random_numbers_are_put_back(auxiliary: Any) -> None:
    plain, following = build(None), torch.rand(3)
    head = build(auxiliary)
    assert torch.equal(torch.rand(3), following)
    assert torch.equal(head.main.weight, plain.main.weight)
    before = torch.get_rng_state()
    one, other = head(torch.ones(40, DIM))[1], head(torch.ones(40, DIM))[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)
    torch.manual_seed(5)
    later = head(torch.ones(40, DIM))[1]
    assert torch.equal(later, one) is (auxiliary == "linear"), "dropout follows the seed"


def test_the_hidden_layer_is_dropped_out_then_normalised() -> None:
    head = build("mlp")
    layers = list(head.auxiliary or [])
    assert [type(layer).__name__ for layer in layers] == ["Linear", "Dropout", "BatchNormOverRanks", "ReLU", "Linear"]
    assert (layers[0].out_features, layers[1].p) == (HIDDEN_UNITS, DROPOUT) == (200, 0.1)
    layers[1].p = 0.0
    hidden_BH = layers[2](layers[0](torch.randn(50, DIM)))
    torch.testing.assert_close(hidden_BH.mean(0), torch.zeros(HIDDEN_UNITS), rtol=0, atol=1e-5)
