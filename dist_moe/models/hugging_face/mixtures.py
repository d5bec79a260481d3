"""Parts of both our architectures inside of transformers, mixed into its classes. Needs no transformers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dist_moe.gates import GateContext
from dist_moe.layer import MoEOutput
from dist_moe.models.hugging_face.files import RemoteCode
from dist_moe.models.moe_model import RunShape
from dist_moe.parallel import SingleWorld

Forward = TypeVar("Forward", bound=Callable[..., Any])

_FIRST_VALUES = "_first_values"


class MixtureBlock(nn.Module):
    """A module with an MoE layer. ``ids_BS``: tokens of the coming pass. ``mixture``: what the last one gave."""

    ids_BS: Tensor | None = None
    mixture: MoEOutput | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which begins without a pass."""
        return {name: value for name, value in self.__dict__.items() if name not in ("ids_BS", "mixture")}


class WithMixtures:
    """A model of transformers with MoE layers: what they begin with, what they did, and their part of the loss.

    ``remote_code``: what is saved with it. A pass that is computed again would not find its tokens, so gradient
    checkpointing is refused.
    """

    remote_code: ClassVar[RemoteCode]
    supports_gradient_checkpointing = False
    training: bool
    config: Any

    @property
    def blocks(self) -> list[MixtureBlock]:
        """The modules with an MoE layer, in order."""
        return [module for module in self.modules() if isinstance(module, MixtureBlock)]  # type: ignore[attr-defined]

    @property
    def mixtures(self) -> list[MoEOutput]:
        """Routes, auxiliary losses and loads of the last forward pass, by layer."""
        return [block.mixture for block in self.blocks if block.mixture is not None]

    def forward_with_losses(self, theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what ``theirs`` gives; in training its loss, if it has one, includes the gates' auxiliary losses."""
        asked = kwargs.pop("return_dict", None)
        output = theirs(*args, **kwargs, return_dict=True)
        if self.training and output.loss is not None:
            output.loss = output.loss + sum(loss for mixture in self.mixtures for loss in mixture.aux.values())
        return output if (self.config.return_dict if asked is None else asked) else output.to_tuple()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save by transformers, but for the module that goes along: it would copy one that hides whose it is."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        self.remote_code.write(Path(save_directory))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Parts of MoE layers begin by their own rules, all else by transformers'."""
        if not hasattr(module, _FIRST_VALUES):
            super()._init_weights(module)  # type: ignore[misc]
            return
        for name, value in getattr(module, _FIRST_VALUES).items():
            module.get_buffer(name).copy_(value)


def takes_inputs_of(theirs: Callable[..., Any]) -> Callable[[Forward], Forward]:
    """Declare the inputs of ``theirs`` for a forward that hands everything on to it: transformers' Trainer asks."""

    def declare(forward: Forward) -> Forward:
        forward.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
        return forward

    return declare


def import_gates(modules: Sequence[str] | None) -> None:
    """Import the user's own modules, which register gates. Raises ImportError for one that cannot be found."""
    for name in modules or ():
        importlib.import_module(name)


def run_of(vocab_size: int, context: Mapping[str, Any] | None) -> RunShape:
    """Return one process, which does not know how often tokens occur: what is made from that is in the checkpoint."""
    total_steps = (context or {}).get("total_steps")
    return RunShape(SingleWorld(), 1, GateContext(torch.ones(vocab_size, dtype=torch.int64), total_steps))


def keep_first_values(layer: nn.Module) -> None:
    """Keep buffers that no checkpoint has, of an MoE layer just built: transformers would leave them undefined."""
    for module in layer.modules():
        names = module._non_persistent_buffers_set
        if names:
            setattr(module, _FIRST_VALUES, {name: module.get_buffer(name).clone() for name in names})
        else:
            module._is_hf_initialized = True  # type: ignore[assignment]
