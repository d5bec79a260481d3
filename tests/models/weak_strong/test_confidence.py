"""Dispersion and confidence: identities, monotonicity, and the switch of the gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_moe.models.weak_strong import CONFIDENCES, DispersionConfig, dispersion


def drawn(rows: int = 200, classes: int = 5) -> Tensor:
    return 3 * torch.randn(rows, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def built(name: str = "dispersion", **fields: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return CONFIDENCES.by_name[name].model_validate({"name": name} | fields).build(num_features=4).double()


@pytest.mark.parametrize("classes", [2, 3, 7, 45])
def test_dispersion_is_that_of_a_loop_and_of_the_definition(classes: int) -> None:
    logit_BC = drawn(20, classes).requires_grad_()
    given = dispersion(logit_BC)
    one_hot = torch.eye(classes, dtype=torch.float64)[0]
    rows = []
    for logits in logit_BC:
        p = logits.exp() / logits.exp().sum()
        relative = p.var(unbiased=False) / one_hot.var(unbiased=False)
        rows.append(torch.stack([relative, 1 - sum(-x * x.log() for x in p) / math.log(classes)]))
    assert torch.allclose(given, torch.stack(rows))
    ours, theirs = (torch.autograd.grad(d.square().sum(), logit_BC)[0] for d in (given, torch.stack(rows)))
    assert torch.allclose(ours, theirs)
    assert torch.allclose(dispersion(torch.zeros(1, classes)), torch.zeros(1, 2), atol=1e-6)
    certain = torch.zeros(1, classes)
    certain[0, 1] = 1e4
    assert torch.allclose(dispersion(certain), torch.ones(1, 2), rtol=0, atol=1e-6)


def test_one_class_has_none() -> None:
    with pytest.raises(ValueError, match="1 class"):
        dispersion(torch.zeros(3, 1))


@pytest.mark.parametrize("of", ["both", "variance", "entropy"])
def test_a_monotone_map_rises_with_certainty(of: str) -> None:
    """Along p = softmax(t v) both dispersions rise with t, whatever v is; and so must the confidence."""
    confidence = built(of=of, map="monotone")
    t_K = torch.linspace(0, 4, 50, dtype=torch.float64)
    for direction in drawn(20):
        z_K = confidence(t_K[:, None] * direction, torch.zeros(50, 4))
        assert (z_K.diff() >= -1e-12).all()
        assert z_K[-1] > z_K[0]


@pytest.mark.parametrize("learned", ["mlp", "monotone"])
def test_each_dispersion_alone_is_blind_to_the_other(learned: str) -> None:
    for of, own in (("variance", 0), ("entropy", 1)):
        confidence = built(of=of, map=learned)
        logit_BC = drawn(3)
        expected = confidence.map(dispersion(logit_BC)[:, [own]]).squeeze(1)
        assert torch.equal(confidence(logit_BC, torch.zeros(3, 4)), expected)
    assert DispersionConfig().of == "both"


@pytest.mark.parametrize("learned", ["mlp", "monotone"])
def test_the_gradient_through_the_dispersion_is_a_switch(learned: str) -> None:
    weak_BC, features_BD = drawn(6).requires_grad_(), torch.randn(6, 4, dtype=torch.float64)
    z = {through: built(map=learned, through=through)(weak_BC, features_BD) for through in (True, False)}
    assert torch.equal(z[True], z[False])
    (gradient,) = torch.autograd.grad(z[True].sum(), weak_BC)
    assert gradient.abs().sum() > 0
    assert torch.autograd.grad(z[False].sum(), weak_BC, allow_unused=True) == (None,)


def test_features_count_where_they_are_asked_for() -> None:
    weak_BC, one, other = drawn(6), torch.zeros(6, 4).double(), torch.ones(6, 4).double()
    assert torch.equal(built()(weak_BC, one), built()(weak_BC, other))
    assert not torch.equal(built(with_features=True)(weak_BC, one), built(with_features=True)(weak_BC, other))
    gate = built("features")
    assert torch.equal(gate(weak_BC, other), gate(-weak_BC, other))
    assert not torch.equal(gate(weak_BC, one), gate(weak_BC, other))


def test_a_random_confidence_is_uniform_and_stays() -> None:
    features_BD = torch.rand(4000, 4)
    confidence = built("random")
    c_B = confidence(drawn(4000), features_BD).sigmoid()
    assert torch.equal(confidence(-drawn(4000), features_BD).sigmoid(), c_B)
    assert torch.equal(confidence(drawn(7), features_BD[100:107]).sigmoid(), c_B[100:107])
    assert torch.histc(c_B, 10, 0, 1).sub(400).abs().max() < 5 * 19  # five deviations of a binomial
    assert not list(confidence.parameters())


def test_a_hyper_network_has_a_map_for_each_example() -> None:
    """Naive, row by row; and for every example the confidence rises with certainty."""
    confidence: Any = built("hyper_network")
    x_BD = torch.randn(20, 4, dtype=torch.float64)
    weak_BC = drawn(20)
    rows = []
    for weak_C, x_D in zip(weak_BC, x_BD, strict=True):
        first, second, bias = confidence.map(x_D)
        d_2 = dispersion(weak_C[None])[0]
        rows.append((1 + first.exp()).log() * d_2[0] + (1 + second.exp()).log() * d_2[1] + bias)
    assert torch.allclose(confidence(weak_BC, x_BD), torch.stack(rows))
    assert not torch.allclose(confidence(weak_BC, x_BD), confidence(weak_BC, x_BD.flip(0)))
    surer_B = confidence(2 * weak_BC, x_BD)
    assert (surer_B > confidence(weak_BC, x_BD)).all()
