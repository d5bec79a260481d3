"""Weights by name into a model that may hold any share of the experts, every name accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dist_moe.errors import UserError
from dist_moe.experts import ExpertBank

ROUTERS = (".gates.", ".permutation.")
"""Parts of names of parameters that choose experts."""


@torch.no_grad()
def place_weights(model: nn.Module, weights: Mapping[str, Tensor], fresh: Sequence[str] = ()) -> None:
    """Copy ``weights``, experts stacked along axis 0 by global id, into the parameters of ``model``, and buffers
    where ``weights`` has them.

    ``fresh``: parts of the names of parameters that keep their first values where ``weights`` has none of them.
    Parameters without storage (of a plan) stay so. Raises UserError naming every parameter that ``weights`` lacks,
    has in excess or has in another shape; nothing is changed then.
    """
    bank_of = {id(p): bank for bank in model.modules() if isinstance(bank, ExpertBank) for p in bank.parameters()}
    parameters = dict(model.named_parameters())
    faults = [f"it has no {name}" for name in parameters.keys() - weights.keys() if not _any_in(fresh, name)]
    places = parameters | dict(model.named_buffers())
    faults += [f"the model has no {name}" for name in weights.keys() - places.keys()]
    values = {}
    for name in places.keys() & weights.keys():
        bank = bank_of.get(id(places[name]))
        shape = places[name].shape if bank is None else torch.Size([bank.num_experts, *places[name].shape[1:]])
        if weights[name].shape != shape:
            faults.append(f"{name} has shape {tuple(weights[name].shape)}, the model's is {tuple(shape)}")
        else:
            values[name] = weights[name] if bank is None else weights[name][list(bank.expert_ids)]
    if faults:
        raise UserError("these weights are not of this model: " + "; ".join(sorted(faults)))
    for name, value in values.items():
        places[name].copy_(value)


def _any_in(parts: Sequence[str], name: str) -> bool:
    return any(part in name for part in parts)
