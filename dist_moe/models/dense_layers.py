"""Dense layers one after another, as the heads, towers and bottoms of models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def dense_layers(widths: Sequence[int]) -> nn.Sequential:
    """Return dense layers between the given widths, a ReLU after all but the last; Keras' first weights."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        dense = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(dense.weight)
        nn.init.zeros_(dense.bias)
        layers += [dense, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
