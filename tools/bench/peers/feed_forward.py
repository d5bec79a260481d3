"""The expert that DeepSpeed and FairScale take as a module: the one of Mixtral, as its users write it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.bench.candidate import Gradients, grad_of
from tools.bench.workloads import Material


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); weights (out, in) as in ``nn.Linear``."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.up = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.down = nn.Linear(hidden, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
def load(experts: Sequence[nn.Module], given: Material, here: slice) -> None:
    """Give them the weights of the experts ``here``."""
    for e, expert in zip(range(here.start, here.stop), experts, strict=True):
        assert isinstance(expert, SwiGLU)
        expert.gate.weight.copy_(given.gate_EDF[e].T)
        expert.up.weight.copy_(given.up_EDF[e].T)
        expert.down.weight.copy_(given.down_EFD[e].T)


def gradients_of(experts: Sequence[nn.Module]) -> Gradients:
    return {
        name: torch.stack([grad_of(expert.get_parameter(f"{name}.weight")).T for expert in experts])
        for name in ("gate", "up", "down")
    }
