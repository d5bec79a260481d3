"""Steps whose gradient is not finite: skipped on all ranks alike, and traced to a layer.

The global norm of all gradients is the same on all ranks and not finite as soon as one gradient of one
rank is not. So every rank leaves the step out by itself, without a message: DeepSpeed from ZeRO stage 1
on, our engine at stage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.engine.monitor.step_window import Sums
from dist_moe.errors import DivergedError
from dist_moe.parallel import gather_objects

Losses = Callable[[], tuple[Tensor, Sums]]
"""One micro-batch's forward pass: its loss, and the numbers that are recorded, by name."""

_BEFORE_ALL = -1  # wrong already when the step begins


@dataclass(frozen=True, order=True)
class NonFinite:
    """A value that is not finite. ``order``: place among the modules that ran. ``what``: its name."""

    order: int
    rank: int
    what: str


def diverged(model: nn.Module, micro_batches: Sequence[Losses], rank: int, step: int, limit: int) -> DivergedError:
    """Return the error to raise after ``limit`` skipped steps, the last of them ``step`` (from 1).

    Computes that step's micro-batches once more, watching every module. Collective over all ranks.
    """
    mine = [astuple(value) for value in first_nonfinite(model, micro_batches, rank)]
    found = [NonFinite(*value) for of_rank in gather_objects(mine) for value in of_rank]
    if found:
        first = min(found)
        where = f"the first such value of step {step} is {first.what}, on rank {first.rank}"
    else:
        where = f"step {step}, computed once more, is finite: it depends on more than data, parameters and seed"
    return DivergedError(
        f"{limit} step(s) in a row, {step - limit + 1}..{step}, had a loss or gradient that is not finite and were "
        f"skipped on all ranks; {where}. The parameters are still those of step {step - limit}. Look at the data, "
        "lower deepspeed.optimizer.params.lr, set deepspeed.gradient_clipping, "
        f"or raise train.max_skipped_steps={limit}",
        step,
    )


def first_nonfinite(model: nn.Module, micro_batches: Sequence[Losses], rank: int) -> list[NonFinite]:
    """Return this rank's first non-finite value, or nothing.

    Parameters come first, then the modules' outputs in the order in which they ran, then the loss, then gradients in
    the order of the backward pass. Every rank runs all of it, since the passes hold collectives.
    """
    found = [
        NonFinite(_BEFORE_ALL, rank, f"the parameter {name}")
        for name, parameter in model.named_parameters()
        if not _is_finite(parameter)
    ]
    for compute in micro_batches:
        with _watched(model) as ran:
            loss, numbers = compute()
        outputs = [(order, name) for order, (name, finite) in enumerate(ran) if not finite]
        found += [NonFinite(order, rank, f"the output of {name}") for order, name in outputs[:1]]
        losses = [name for name, number in numbers.items() if isinstance(number, Tensor) and not _is_finite(number)]
        if losses and not outputs:
            found.append(
                NonFinite(len(ran), rank, f"the loss {losses[-1]}, though the outputs of all layers are finite")
            )
        found += _nonfinite_gradient(model, loss, [name for name, _ in ran], rank)
    return sorted(found)[:1]


def _nonfinite_gradient(model: nn.Module, loss: Tensor, ran: list[str], rank: int) -> list[NonFinite]:
    """Return the gradient that went wrong first: the backward pass comes to the module that ran last, first."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
    wrong = [
        name
        for (name, _), gradient in zip(named, gradients, strict=True)
        if gradient is not None and not _is_finite(gradient)
    ]
    if not wrong:
        return []
    place = {name: order for order, name in enumerate(ran)}
    last = max(wrong, key=lambda name: place.get(name.rpartition(".")[0], -1))
    distance = len(ran) - place.get(last.rpartition(".")[0], -1)
    return [NonFinite(len(ran) + distance, rank, f"the gradient of {last}")]


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[str, bool]]]:
    """Collect the modules' names as their forward passes end, and whether all they gave was finite."""
    ran: list[tuple[str, bool]] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: ran.append((name, all(map(_is_finite, _tensors_in(output)))))

    handles = [module.register_forward_hook(note(name or "the model")) for name, module in model.named_modules()]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors_in(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name))


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())
