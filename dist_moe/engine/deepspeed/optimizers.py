"""Optimizers: those that are allowed, all of torch, built here so that DeepSpeed compiles none of its own unasked."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

from dist_moe.engine.deepspeed.config import (
    DeepSpeedSection,
    complete_optimizer,
    import_deepspeed,
    is_adam,
    offloads_optimizer,
)
from dist_moe.engine.deepspeed.kinds import (
    ABOVE_0,
    AT_LEAST_0,
    BELOW_1,
    FLAG,
    UP_TO_1,
    Kind,
    check_parameters,
    number,
    pair,
    suggestion,
    written,
)
from dist_moe.errors import UserError

_ALL = {"lr": AT_LEAST_0, "maximize": FLAG, "foreach": FLAG}
_DECAYING = _ALL | {"weight_decay": AT_LEAST_0}
_OF_ADAM = _DECAYING | {"betas": pair(BELOW_1), "eps": ABOVE_0}
_ADAM = _OF_ADAM | {"amsgrad": FLAG, "fused": FLAG, "torch_adam": FLAG, "adam_w_mode": FLAG}
_COMPILED_ADAM = ("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode")

OPTIMIZERS: dict[str, dict[str, Kind]] = {
    "AdamW": _ADAM,
    "Adam": _ADAM,
    "Adadelta": _DECAYING | {"rho": UP_TO_1, "eps": ABOVE_0},
    "Adamax": _OF_ADAM,
    "ASGD": _DECAYING | {"lambd": AT_LEAST_0, "alpha": AT_LEAST_0, "t0": AT_LEAST_0},
    "NAdam": _OF_ADAM | {"momentum_decay": AT_LEAST_0, "decoupled_weight_decay": FLAG},
    "RAdam": _OF_ADAM | {"decoupled_weight_decay": FLAG},
    "RMSprop": _DECAYING | {"alpha": BELOW_1, "eps": ABOVE_0, "momentum": BELOW_1, "centered": FLAG},
    "Rprop": _ALL | {"etas": pair(ABOVE_0), "step_sizes": pair(ABOVE_0)},
    "SGD": _DECAYING
    | {
        "momentum": BELOW_1,
        "dampening": number("at most 1", lambda v: v <= 1),
        "nesterov": FLAG,
        "fused": FLAG,
    },
}
"""The parameters of every allowed optimizer: each has been trained with, saved and resumed at every ZeRO stage by a
test that walks this list. All step element by element, so that ZeRO may cut parameters up as it likes."""

_COMPILED = "DeepSpeed compiles it on first use, and checkpoints are not proved with it"
_OTHER_SHAPES = "its states have other shapes than the parameters, which ZeRO cuts up"
REFUSED_OPTIMIZERS = {
    "LBFGS": "it computes the loss several times within a step",
    "SparseAdam": "it is for sparse gradients, and there are none",
    "Adagrad": "DeepSpeed puts its parameter groups together, those of experts too, from ZeRO stage 1 on",
    "Adafactor": _OTHER_SHAPES,
    "Muon": "it is for matrices alone, and ZeRO cuts parameters up",
    **dict.fromkeys(("Lamb", "Lion", "OneBitAdam", "OneBitLamb", "ZeroOneAdam", "FusedAdam", "CPUAdam"), _COMPILED),
}
"""Optimizers of torch and DeepSpeed that are refused, with the reason of each."""


def build_optimizer(
    section: DeepSpeedSection, parameters: Iterable[Any], *, of_torch: bool = False
) -> torch.optim.Optimizer:
    """Return the optimizer of a DeepSpeed section over parameters, or groups of them.

    ``of_torch``: take torch's Adam also where DeepSpeed's is asked for, which has the same states and is compiled.
    """
    optimizer = complete_optimizer(section["optimizer"])
    params = dict(optimizer.get("params", {}))
    if not is_adam(optimizer["type"]):
        kind: Any = getattr(torch.optim, optimizer["type"])
        return kind(parameters, **params)
    # "Adam" decays weights as AdamW does unless told otherwise: DeepSpeed's habit, which configurations rely on.
    decoupled = params.pop("adam_w_mode", True) or optimizer["type"].lower() == "adamw"
    if not params.pop("torch_adam") and not of_torch:
        return import_deepspeed().ops.adam.FusedAdam(parameters, adam_w_mode=decoupled, **params)
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(parameters, **params)


def optimizer_on_two_numbers(section: DeepSpeedSection) -> torch.optim.Optimizer:
    """Return the section's optimizer over one parameter of two elements, on the CPU."""
    return build_optimizer(section, [nn.Parameter(torch.ones(2))], of_torch=True)


def take_step(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Take a step of an optimizer over one parameter, whose last element has no gradient; return the states."""
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.ones_like(parameter)
    parameter.grad[-1] = 0.0  # an expert that no token reaches: 0 / 0 where eps is too small
    optimizer.step()
    return dict(optimizer.state[parameter])


def first_states_of(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """Return what an optimizer like ``optimizer``, with the values of its first group, has of a parameter after a step.

    The parameter has two elements, on ``device``.
    """
    group = optimizer.param_groups[0] | {"params": [nn.Parameter(torch.ones(2, device=device))]}
    like: Any = type(optimizer)
    return take_step(like([group]))


def has_shape(state: Any) -> bool:
    """Return whether an optimizer's state is a tensor of its parameter's shape, not one number for all elements."""
    return isinstance(state, Tensor) and state.dim() > 0


def check_optimizer(section: DeepSpeedSection) -> None:
    """Raise UserError unless the section's optimizer is allowed, its parameters fit, and it can take a few steps."""
    name, params = section["optimizer"]["type"], section["optimizer"].get("params", {})
    canonical = {"adam": "Adam", "adamw": "AdamW"}.get(name.lower(), name)
    refused = {one.lower(): why for one, why in REFUSED_OPTIMIZERS.items()}
    if name.lower() in refused:
        raise UserError(
            f"deepspeed.optimizer.type={name} is refused: {refused[name.lower()]}; allowed are {', '.join(OPTIMIZERS)}"
        )
    if canonical not in OPTIMIZERS:
        raise UserError(
            f"deepspeed.optimizer.type={written(name)} is refused: there is no such one; {suggestion(name, OPTIMIZERS)}"
        )
    kinds = OPTIMIZERS[canonical]
    if is_adam(name) and isinstance(params, dict) and params.get("torch_adam") is False:
        _check_compiler(section)
        kinds = {key: kinds[key] for key in _COMPILED_ADAM}
        name = "DeepSpeed's own Adam (torch_adam=false)"
    check_parameters("optimizer.params", params, kinds, name)
    try:
        optimizer = optimizer_on_two_numbers(section)
        states = [take_step(optimizer) for _ in range(3)][-1]
    except Exception as error:  # whatever torch says to values that it cannot use
        raise UserError(f"deepspeed.optimizer.params={written(params)} do not suit {name}: {error}") from error
    (parameter,) = optimizer.param_groups[0]["params"]
    if not all(torch.as_tensor(value).isfinite().all() for value in (parameter, *states.values())):
        raise UserError(
            f"deepspeed.optimizer.params={written(params)} do not suit {name}: its third step is not finite any more"
        )


def _check_compiler(section: DeepSpeedSection) -> None:
    field = "deepspeed.optimizer.params.torch_adam=false"
    if offloads_optimizer(section) or not torch.cuda.is_available():
        raise UserError(
            f"{field} is refused: DeepSpeed's own Adam for CPUs is compiled on first use, and a killed build leaves a "
            "lock for which later runs wait for ever; leave it out (true)"
        )
    if import_deepspeed().git_version_info.installed_ops.get("fused_adam"):
        return
    compilers = [name for name in ("g++", "c++", "clang++") if shutil.which(name)]
    nvcc = cpp_extension.CUDA_HOME and shutil.which("nvcc", path=f"{cpp_extension.CUDA_HOME}/bin")
    needed = {"CUDA_HOME with nvcc": nvcc, "a C++ compiler": compilers, "ninja": shutil.which("ninja")}
    if missing := [name for name, found in needed.items() if not found]:
        raise UserError(
            f"{field} is refused: DeepSpeed compiles its own Adam on first use, and this machine lacks "
            f"{', '.join(missing)}; leave it out (torch's fused Adam), or install what is missing"
        )
