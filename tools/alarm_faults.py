"""A callback that damages the routing of a run at a known step: import it by ``imports: [tools.alarm_faults]``.

Nothing of it looks at loads or alarms: what follows from the damage is the run's own doing.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_moe.engine.callbacks import CALLBACKS, Callback, CallbackSettings
from dist_moe.engine.training import Trainer
from dist_moe.gates import NullSlots

LEFT = 0.001
"""How much of the tokens' differences is left where they are made alike."""

TURNED = -2.0
"""Weight of a balance loss that has been turned round: it pays for an uneven load."""

HIGH = 50.0
"""Logit that beats every other one."""

FaultKind = Literal["alike", "turned", "confined", "null"]


class PlantedFault(Callback):
    """Damages the last MoE layer of the model from training step ``onset`` (counted from 1) on.

    ``alike``: its tokens lose what tells them apart (representation collapse: Chi et al., NeurIPS 2022). ``turned``:
    the balance loss of its gates gets a negative weight, and the optimizer does the rest. ``confined``: its gates may
    choose among the first ``slots`` slots only. ``null``: its gates prefer null slots, for every token.
    """

    def __init__(self, kind: FaultKind, onset: int, slots: int) -> None:
        self._kind, self._onset, self._slots = kind, onset, slots

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Plant the fault once; null slots before every step, for the optimizer has its own copy of their bias."""
        if step < self._onset - 1:
            return
        layer = trainer.layers[-1]
        if self._kind == "null":
            for gate in layer.gates:
                _prefer_null_slots(gate)
        elif step == self._onset - 1:
            if self._kind == "alike":
                layer.register_forward_pre_hook(_make_alike)
            for gate in layer.gates:
                if self._kind == "turned":
                    _turn(gate)
                elif self._kind == "confined":
                    gate.allow(torch.arange(gate.num_experts) < self._slots)


def _make_alike(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x_TD, *others = arguments
    mean_1D = x_TD.mean(dim=0, keepdim=True)
    return (mean_1D + LEFT * (x_TD - mean_1D), *others)


def _turn(gate: Any) -> None:
    if not gate.balance_weight:
        raise ValueError(f"{type(gate).__name__} has no balance loss that could be turned: give it a weight")
    gate.balance_weight = TURNED


@torch.no_grad()
def _prefer_null_slots(gate: Any) -> None:
    if not isinstance(gate, NullSlots):
        raise ValueError(f"{type(gate).__name__} has no null slots")
    bias_S: Tensor = gate.gate.bias  # type: ignore[assignment]
    bias_S[gate.num_experts :] = HIGH


@CALLBACKS.register
class PlantedFaultSettings(CallbackSettings):
    """A fault that is planted in the routing; for studies of the alarms alone."""

    name: Literal["planted_fault"] = "planted_fault"
    kind: FaultKind = Field(description="what is damaged")
    onset: int = Field(ge=1, description="the first training step that is damaged, counted from 1")
    slots: int = Field(2, ge=1, description="slots that are left, of kind confined")

    def build(self) -> PlantedFault:
        """Return the callback."""
        return PlantedFault(self.kind, self.onset, self.slots)
