"""Where the first value that is not finite came up: parameter, output, loss or gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dist_moe.engine.health.nonfinite import first_nonfinite


class Root(nn.Module):
    """The square root: its gradient at 0 is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * x).sqrt()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.root, self.last = nn.Linear(2, 2), Root(), nn.Linear(2, 1)
        nn.init.ones_(self.first.weight)
        nn.init.zeros_(self.first.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.root(self.first(x)))


def nonfinite_of(net: Net, x: Tensor, target: float = 0.0) -> str:
    def compute() -> tuple[Tensor, Mapping[str, Tensor]]:
        loss = (net(x) - target).abs().mean()
        return loss, {"total_loss": loss, "mae": loss}

    return "; ".join(value.what for value in first_nonfinite(net, [compute], rank=0))


def test_nothing_to_find() -> None:
    assert nonfinite_of(Net(), torch.ones(3, 2)) == ""


def test_the_first_output_in_the_order_of_the_pass() -> None:
    assert nonfinite_of(Net(), torch.tensor([[1.0, math.nan]])) == "the output of first"
    assert nonfinite_of(Net(), -torch.ones(1, 2)) == "the output of root"


def test_a_parameter_comes_before_what_it_spoils() -> None:
    net = Net()
    with torch.no_grad():
        net.last.bias.fill_(math.inf)
    assert nonfinite_of(net, torch.ones(1, 2)) == "the parameter last.bias"


def test_a_loss_of_finite_outputs() -> None:
    assert nonfinite_of(Net(), torch.ones(1, 2), math.nan).startswith("the loss mae, though")


def test_the_first_gradient_in_the_order_of_the_backward_pass() -> None:
    """sqrt'(0) spoils its own factor, then what is below it, and leaves the layer above alone."""
    assert nonfinite_of(Net(), torch.zeros(1, 2)) == "the gradient of root.scale"
