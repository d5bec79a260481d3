"""The parameters of B models of one shape, stacked on axis 0, and Adam on them with B learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.adamw import adamw

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class AdamSettings:
    """Settings that all trials share, their learning rates apart; ``decoupled`` tells AdamW from Adam."""

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool


class StackedParameters:
    """``values``: parameters by name, (B, ...); leaves that take gradients. ``buffers``: (B, ...)."""

    def __init__(self, models: Sequence[nn.Module], device: torch.device) -> None:
        def stacked(of_models: list[Tensors]) -> Tensors:
            first = of_models[0]
            return {name: torch.stack([one[name].detach() for one in of_models]).to(device) for name in first}

        self.values = stacked([dict(model.named_parameters()) for model in models])
        self.buffers = stacked([dict(model.named_buffers()) for model in models])
        for value in self.values.values():
            value.requires_grad_()
        self._first = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self._second = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self._steps = 0

    def keep(self, trials: Sequence[int]) -> None:
        """Go on with these trials only."""
        index = torch.tensor(trials, device=next(iter(self.values.values())).device)
        self.values = {name: v.detach()[index].requires_grad_() for name, v in self.values.items()}
        self.buffers = {name: v[index] for name, v in self.buffers.items()}
        self._first = {name: v[index] for name, v in self._first.items()}
        self._second = {name: v[index] for name, v in self._second.items()}

    def state_of(self, trial: int) -> tuple[Tensors, Tensors]:
        """Return copies of the parameters and buffers of one trial."""
        return (
            {name: v.detach()[trial].clone() for name, v in self.values.items()},
            {name: v[trial].clone() for name, v in self.buffers.items()},
        )

    def restore(self, states: Sequence[tuple[Tensors, Tensors]]) -> None:
        """Take parameters and buffers of trials as :meth:`state_of` gave them, to be evaluated."""
        parameters, buffers = zip(*states, strict=True)
        self.values = {name: torch.stack([one[name] for one in parameters]) for name in self.values}
        self.buffers = {name: torch.stack([one[name] for one in buffers]) for name in self.buffers}

    def write(self, model: nn.Module, trial: int) -> None:
        """Put one trial's parameters and buffers into ``model``."""
        parameters, buffers = self.state_of(trial)
        model.load_state_dict(parameters | buffers, strict=False)

    @torch.no_grad()
    def step(self, learning_rates: Sequence[float], settings: AdamSettings) -> None:
        """Take one step of Adam for each trial from the gradients of ``values``, which are cleared."""
        gradients = {name: value.grad for name, value in self.values.items() if value.grad is not None}
        update = adamw if settings.decoupled else adam
        for trial, learning_rate in enumerate(learning_rates):
            update(
                [self.values[name].detach()[trial] for name in gradients],
                [gradient[trial] for gradient in gradients.values()],
                [self._first[name][trial] for name in gradients],
                [self._second[name][trial] for name in gradients],
                [],
                [torch.tensor(float(self._steps), device=gradient.device) for gradient in gradients.values()],
                fused=True,
                amsgrad=False,
                beta1=settings.betas[0],
                beta2=settings.betas[1],
                lr=learning_rate,
                weight_decay=settings.weight_decay,
                eps=settings.eps,
                maximize=False,
            )
        self._steps += 1
        for value in self.values.values():
            value.grad = None
