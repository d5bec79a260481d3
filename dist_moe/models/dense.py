"""The dense parts of a transformer, initialised as is usual: normal, smaller where results join the residual stream."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02


def residual_std(layers: int) -> float:
    """Of weights whose results are added to the residual stream, twice per layer (Radford et al., GPT-2, 2019)."""
    return INIT_STD / (2 * layers) ** 0.5


def linear(dim: int, out_dim: int, std: float = INIT_STD) -> nn.Linear:
    """Without bias; weights from N(0, std)."""
    layer = nn.Linear(dim, out_dim, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class SwiGLU(nn.Module):
    """y = (silu(x W) * (x U)) V, for every token alike (Shazeer, GLU variants, 2020)."""

    def __init__(self, dim: int, hidden: int, out_std: float = INIT_STD) -> None:
        super().__init__()
        self.gate = linear(dim, hidden)
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim, out_std)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result
