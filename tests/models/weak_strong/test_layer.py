"""The layer of two unlike experts against formulas in fp64: extremes, derivatives, and the order of the mixtures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_moe.models.weak_strong import Mixture, WeakStrong, WeakStrongOutput, mixed_losses

MIXTURES: tuple[Mixture, ...] = ("losses", "predictions", "logits")


class Fixed(nn.Module):
    """A confidence that is given."""

    def __init__(self, z: Tensor | float) -> None:
        super().__init__()
        self.z = z

    def forward(self, weak_BC: Tensor, features_BD: Tensor) -> Tensor:
        return torch.as_tensor(self.z, dtype=weak_BC.dtype).expand(len(weak_BC))


def experts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(rows: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_BD = torch.randn(rows, 4, dtype=torch.float64, generator=generator)
    return x_BD, torch.randint(3, (rows,), generator=generator)


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    grads = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in grads]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("sure", [True, False])
def test_at_its_extremes_it_is_one_expert(mixture: Mixture, sure: bool) -> None:
    """C = 1: exactly the weak one; C = 0: exactly the strong one; in loss, gradients and predictions."""
    weak, strong = experts()
    x_BD, label_B = data()
    output = WeakStrong(weak, strong, Fixed(torch.inf if sure else -torch.inf), mixture)(x_BD)
    one, other = (weak, strong) if sure else (strong, weak)
    alone = F.cross_entropy(one(x_BD), label_B, reduction="none")
    loss_B = output.cross_entropy(label_B)
    assert torch.allclose(loss_B, alone, rtol=0, atol=1e-15)
    for ours, theirs in zip(gradients(loss_B.sum(), one), gradients(alone.sum(), one), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)
    assert all(not gradient.any() for gradient in gradients(loss_B.sum(), other))
    assert torch.equal(output.predictions[0].argmax(1), one(x_BD).argmax(1))
    assert torch.allclose(output.predictions[0], one(x_BD).log_softmax(1), rtol=0, atol=1e-15)
    assert torch.equal(output.right(label_B), (one(x_BD).argmax(1) == label_B).double())


def test_derivatives_of_the_mixed_losses() -> None:
    """By C it is l - l'; what either expert learns from an example has the weight C or 1 - C."""
    x_BD, label_B = data()
    weak_BC, strong_BC = (expert(x_BD).detach().requires_grad_() for expert in experts())
    c_B = torch.rand(9, dtype=torch.float64, requires_grad=True)
    weak_B, strong_B = (F.cross_entropy(logits, label_B, reduction="none") for logits in (weak_BC, strong_BC))
    by_c, by_weak, by_strong = torch.autograd.grad(
        mixed_losses(c_B, weak_B, strong_B).sum(), [c_B, weak_BC, strong_BC], retain_graph=True
    )
    assert torch.allclose(by_c, weak_B - strong_B)
    one_hot = F.one_hot(label_B, 3)
    assert torch.allclose(by_weak, c_B[:, None] * (weak_BC.softmax(1) - one_hot))
    assert torch.allclose(by_strong, (1 - c_B)[:, None] * (strong_BC.softmax(1) - one_hot))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_loss_is_that_of_a_loop(mixture: Mixture) -> None:
    weak, strong = experts()
    x_BD, label_B = data()
    z_B = torch.randn(9, dtype=torch.float64, requires_grad=True)
    loss_B = WeakStrong(weak, strong, Fixed(z_B), mixture)(x_BD).cross_entropy(label_B)
    expected = []
    for x, y, z in zip(x_BD, label_B, z_B, strict=True):
        c, p, q = 1 / (1 + (-z).exp()), weak(x).softmax(0), strong(x).softmax(0)
        if mixture == "losses":
            expected.append(-c * p[y].log() - (1 - c) * q[y].log())
        elif mixture == "predictions":
            expected.append(-(c * p[y] + (1 - c) * q[y]).log())
        else:
            expected.append(-(c * weak(x) + (1 - c) * strong(x)).softmax(0)[y].log())
    leaves = [z_B, *weak.parameters(), *strong.parameters()]
    ours, theirs = (torch.autograd.grad(x.square().sum(), leaves) for x in (loss_B, torch.stack(expected)))
    assert torch.allclose(loss_B, torch.stack(expected))
    assert all(torch.allclose(one, other) for one, other in zip(ours, theirs, strict=True))


def output_of(weak_BC: Tensor, strong_BC: Tensor, z_B: Tensor, mixture: Mixture) -> WeakStrongOutput:
    output: Any = WeakStrong(nn.Identity(), nn.Identity(), Fixed(z_B), mixture).mixed(weak_BC, strong_BC, weak_BC)
    return output


def test_mixed_losses_are_never_less_than_mixed_predictions() -> None:
    generator = torch.Generator().manual_seed(2)
    weak_BC, strong_BC = (4 * torch.randn(5000, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    z_B, label_B = torch.randn(5000, dtype=torch.float64, generator=generator), torch.arange(5000) % 6
    losses, predictions, logits = (output_of(weak_BC, strong_BC, z_B, m).cross_entropy(label_B) for m in MIXTURES)
    assert (losses >= predictions - 1e-12).all()
    assert (losses >= logits - 1e-12).all()
    assert (losses - predictions).min() > 0  # equal only where the experts agree, or one of them answers
    for same, z in ((weak_BC, z_B), (strong_BC, torch.full_like(z_B, torch.inf)), (strong_BC, -torch.inf + 0 * z_B)):
        losses, predictions, logits = (output_of(weak_BC, same, z, m).cross_entropy(label_B) for m in MIXTURES)
        assert torch.allclose(losses, predictions)
        assert torch.allclose(losses, logits)


def test_sure_and_wrong_experts_give_finite_losses() -> None:
    weak_BC, strong_BC = torch.tensor([[500.0, 0.0]]), torch.tensor([[300.0, 0.0]])
    for mixture in MIXTURES:
        z_B = torch.tensor([90.0], requires_grad=True)
        loss_B = output_of(weak_BC, strong_BC, z_B, mixture).cross_entropy(torch.tensor([1]))
        (gradient,) = torch.autograd.grad(loss_B.sum(), z_B)
        assert 300 <= float(loss_B.detach()) <= 501
        assert torch.isfinite(gradient).all()


def test_the_strong_expert_runs_for_the_rows_alone_that_ask_it() -> None:
    weak, strong = experts()
    x_BD, _ = data()
    z_B = torch.linspace(-2, 2, 9, dtype=torch.float64)
    layer, seen = WeakStrong(weak, strong, Fixed(z_B)).eval(), list[Tensor]()
    strong.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for threshold in (0.0, 0.4, 2.0):
        asks_B = z_B.sigmoid() < threshold
        expected_B = torch.where(asks_B, strong(x_BD).argmax(1), weak(x_BD).argmax(1))
        seen.clear()
        class_B, given_B = layer.classify(x_BD, threshold=threshold)
        assert torch.equal(class_B, expected_B)
        assert torch.equal(given_B, asks_B)
        assert [rows.tolist() for rows in seen] == ([x_BD[asks_B].tolist()] if asks_B.any() else [])
