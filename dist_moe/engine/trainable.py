"""Holding a part of a model still while the rest trains.

    with hold_still(model, ["*.gates.*"]):
        engine = ExpertParallelEngine(model, section, groups)
        ...
        engine.destroy()

Parameters *and* buffers of the held part are bit-equal afterwards, at every ZeRO stage and layout. The optimizer does
not know held parameters: no weight decay, no moments. Held modules stay in evaluation mode and hear nothing of
training steps, so that statistics of batches, balance biases, schedules and slot tables stand still too; they are
deterministic (no dropout, no noise), and gates route as in an evaluation. Gradients still flow through them to what
trains below. A slot table that is still being learnt stays at its last rounding: call ``end_learning()`` before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from dist_moe.errors import UserError

_HEARD = ("begin_step", "end_step", "begin_evaluation", "end_learning")
"""Methods by which gates and slot tables hear of a training, and change their buffers."""


Trained = Callable[[str], bool] | Sequence[str]
"""Which parameters train: a predicate on their names, or shell-like patterns."""


@contextmanager
def hold_still(model: nn.Module, trained: Trained) -> Iterator[None]:
    """Train only what ``trained`` accepts: a predicate on names of parameters and buffers, or shell-like patterns.

    Enter it on every rank, with the same ``trained``, before the engine is built, and leave it after the engine is
    destroyed: ``requires_grad`` and mode of everything are then as before. A module is held if none of its parameters
    is trained; one with buffers alone, if none of them is accepted. What lies in a held module is held.

    Raises UserError for a pattern that matches no name, and if no parameter would be trained.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    patterns = [] if callable(trained) else list(trained)
    accepts = trained if callable(trained) else lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise UserError(f"trained={pattern}: no parameter or buffer has such a name; one is {named[0][0]}")
    accepted = {id(tensor) for name, tensor in named if accepts(name)}  # tied parameters train under either name
    still = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in accepted]
    if not any(parameter.requires_grad and id(parameter) in accepted for parameter in model.parameters()):
        raise UserError(f"trained={patterns or ''}: no parameter would be trained")
    held = [module for module in model.modules() if _is_untouched(module, accepted)]
    modes = [(part, part.training) for module in held for part in module.modules()]
    overridden = [(vars(module), dict(vars(module))) for module in held]
    for module in held:
        module.eval()
        # train() of a parent calls that of its children: this one keeps its mode, and hands the call to no child.
        # By this, search.layers.is_held knows held modules.
        vars(module)["train"] = partial(_keep_mode, module)
        vars(module).update({name: _ignore for name in _HEARD if hasattr(module, name)})
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)
        for now, before in overridden:
            for name in ("train", *_HEARD):
                now.pop(name, None)
                now.update({name: before[name]} if name in before else {})
        for part, mode in modes:
            part.training = mode


def _is_untouched(module: nn.Module, accepted: set[int]) -> bool:
    tensors: list[Tensor] = [*module.parameters()]
    tensors = tensors or [*module.buffers()]
    return bool(tensors) and not any(id(tensor) in accepted for tensor in tensors)


def _keep_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _ignore(*_: Any, **__: Any) -> None:
    """Hear nothing."""
