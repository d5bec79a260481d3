"""The example of docs/emulated.md prints what one process computes that has all tokens and all experts."""

from __future__ import annotations

import re

import pytest
import torch

from dist_moe import MoE
from dist_moe.experts import DenseReLUBank
from dist_moe.gates import Comet
from tests.helpers.commands import REPOSITORY, example_of


def test_the_example_prints_what_one_process_computes(capsys: pytest.CaptureFixture[str]) -> None:
    example = example_of(REPOSITORY / "docs/emulated.md")
    assert len([line for line in example.split("def train")[1].splitlines() if line.strip()]) <= 20
    torch.manual_seed(6)
    exec(example, {"__name__": "example"})
    printed = re.findall(
        r"rank (\d): (\d+) rows computed, (\d+) sent in all, gradient norm (\S+)", capsys.readouterr().out
    )
    torch.manual_seed(6)
    rows_computed, norms = train_alone(torch.randn(4, 100, 16).flatten(0, 1))
    assert [int(rank) for rank, *_ in printed] == [0, 1, 2, 3]
    assert sum(int(rows) for _, rows, *_ in printed) == rows_computed
    assert [float(norm) for *_, norm in printed] == pytest.approx(norms, abs=2e-6)


def train_alone(x_TD: torch.Tensor) -> tuple[int, list[float]]:
    """Rows computed in the last step, and gradient norms of the experts, two by two."""
    torch.manual_seed(0)
    experts = DenseReLUBank(16, 32, 8, range(8))
    moe = MoE(Comet(16, 8, k=2, gamma=0.1), experts)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        out = moe(x_TD)
        out.outputs[0].square().mean().backward()
        optimizer.step()
    return out.rows_computed, [two.norm().item() for two in experts.weight.grad.split(2)]
