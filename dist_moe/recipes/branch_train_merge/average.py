"""The average of models, parameter by parameter: never more than one tensor of each is in memory at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dist_moe.engine.checkpoint import ModelWeights
from dist_moe.errors import UserError


def averaged(models: Sequence[ModelWeights], weight_J: Sequence[float]) -> ModelWeights:
    """Return sum_j weight_j model_j, each tensor computed in fp64 when it is read; weights are normalised.

    A model of weight 0 is not read. Whole numbers, such as slot -> expert tables, have no average: they must be equal.
    Raises UserError where they are not, or where the models differ in shape.
    """
    total = sum(weight_J)
    parts = [(model, weight / total) for model, weight in zip(models, weight_J, strict=True) if weight > 0]
    first = parts[0][0]
    for other, _ in parts[1:]:
        misfits = [name for name in first.keys() | other.keys() if first.specs.get(name) != other.specs.get(name)]
        if misfits:
            raise UserError(f"{first.path} and {other.path} are of different models: {', '.join(sorted(misfits)[:3])}")

    def read(name: str, expert: int | None) -> Tensor:
        value = first.read(name, expert)
        if not first.specs[name].dtype.is_floating_point:
            for other, _ in parts[1:]:
                if not other.read(name, expert).equal(value):
                    raise UserError(
                        f"{name} differs between {first.path} and {other.path}, and whole numbers have no average; "
                        "use the experts as an ensemble"
                    )
            return value
        if len(parts) == 1:
            return value
        mean = torch.zeros(value.shape, dtype=torch.float64)
        for model, weight in parts:
            mean += weight * model.read(name, expert).double()
        return mean.to(value.dtype)

    return replace(first, read=read, path=None, digest="")
