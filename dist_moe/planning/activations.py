"""Bytes that a step keeps of an example for its backward pass, and those that it has beside them at once.

Estimates, from widths that model and experts give of themselves. Kept is the sum over layers; at once with it is what
the backward pass of one layer, or of the loss, takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dist_moe.engine.deepspeed.config import parameter_dtype
from dist_moe.layer import MoE
from dist_moe.models import MoEModel
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks.task import ExampleShape

_FP32, _INT64 = 4, 8
_GATE_TENSORS = 8
"""Tensors of shape (tokens, branches, slots) that a gate keeps for its backward pass, about."""


@dataclass(frozen=True)
class RowsPerToken:
    """Rows that the busiest rank exchanges per token of its own and layer.

    ``sent``: for experts. ``received``: by its experts. ``leaving``, ``arriving``: those of both that go to and come
    from other ranks.
    """

    sent: int
    received: int
    leaving: float
    arriving: float

    @classmethod
    def evenly(cls, per_token: int, size: int) -> RowsPerToken:
        """Return the load of ``per_token`` experts, as often on each of ``size`` ranks."""
        away = per_token * (1 - 1 / size)
        return cls(per_token, per_token, away, away)

    @classmethod
    def at_worst(cls, per_token: int, local: int, size: int) -> RowsPerToken:
        """Return the load of all ranks' tokens on this rank's ``local`` experts; what is too much for these goes to
        others."""
        here = min(per_token, local)
        return cls(per_token, here * size, per_token - here, here * (size - 1))


Load = Callable[[int], RowsPerToken]
"""Gives the rows of a layer of so many experts."""


def bytes_per_example(
    model: MoEModel, config: SupervisedConfig, shape: ExampleShape, load: Load, size: int
) -> tuple[int, int]:
    """Return the bytes of the exchange, there and back, and those of everything else.

    ``size``: ranks over which the experts are split.
    """
    width = parameter_dtype(config.deepspeed).itemsize
    kept, at_once = model.activation_bytes(width, shape.tokens, shape.places)
    layers = list(model.moe_layers.values())
    gating = 0
    for layer in layers:
        slots = sum(gate.num_branches * gate.num_experts for gate in layer.each_gate)
        sent = load(layer.experts.num_experts).sent
        gating += _FP32 * _GATE_TENSORS * slots + sent * (4 * _INT64 + _FP32 * len(layer.each_gate))
    if config.model.one_layer:
        exchange, experts = _one_layer(layers[0], width, load(layers[0].experts.num_experts), size)
        experts += at_once
    else:
        exchange, experts = _several_layers(layers, width, load, at_once, config.model.activation_checkpointing)
    return round(exchange * shape.tokens), round((kept + gating + experts) * shape.tokens)


def _one_layer(layer: MoE, width: int, rows: RowsPerToken, size: int) -> tuple[float, float]:
    """Return the bytes per token of the exchange and of the experts, the gradients of the experts' rows included."""
    bank, received = layer.experts, rows.received
    rows_in = bank.dim * (rows.sent + (2 * received if size > 1 else 0))
    rows_out = bank.out_dim * (rows.sent + received) if size > 1 else 0
    experts = received * (bank.kept_per_row + 2 * bank.out_dim)  # results, and their gradients
    mixed = bank.dim + len(layer.each_gate) * bank.out_dim
    return width * (rows_in + rows_out), width * (experts + mixed)


def _several_layers(layers: list[MoE], width: int, load: Load, at_once: float, recompute: bool) -> tuple[float, float]:
    """Return the bytes per token of the exchange and of the experts.

    With ``recompute`` rows at the experts, and what these make of them, are there for one layer at a time.
    """
    over = (lambda numbers: max(numbers, default=0)) if recompute else sum
    banks = [(layer.experts, load(layer.experts.num_experts)) for layer in layers]
    exchange = over([rows.received * bank.dim for bank, rows in banks])
    exchange += sum(rows.sent * bank.out_dim for bank, rows in banks)
    experts = over([rows.received * bank.kept_per_row for bank, rows in banks])
    gradients = [width * (rows.sent + rows.received) * (bank.dim + bank.out_dim) for bank, rows in banks]
    return width * exchange, width * experts + max([at_once, *gradients])
