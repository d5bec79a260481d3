"""The split experts of any model: banks of layers of several ranks, their worlds, and their tensors' names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from torch import nn

from dist_moe.experts import ExpertBank
from dist_moe.layer import MoE
from dist_moe.parallel import World


@dataclass(frozen=True)
class SplitBank:
    """A bank whose experts are split over the ranks of ``world``, called ``name`` in its model."""

    name: str
    bank: ExpertBank
    world: World

    def tensor_names(self) -> Iterator[str]:
        """Yield the names of its parameters and buffers in the model."""
        for name, _ in chain(self.bank.named_parameters(), self.bank.named_buffers()):
            yield f"{self.name}.{name}" if self.name else name


def split_banks(model: nn.Module) -> list[SplitBank]:
    """Return the banks in ``model`` that layers of several ranks own, each once, in the order of the modules."""
    worlds = {module.experts: module.world for module in model.modules() if isinstance(module, MoE)}
    return [
        SplitBank(name, module, worlds[module])
        for name, module in model.named_modules()
        if isinstance(module, ExpertBank) and module in worlds and worlds[module].size > 1
    ]


def split_parameters(model: nn.Module) -> dict[nn.Parameter, World]:
    """Return the parameters of :func:`split_banks`, each with the world over which its experts are split."""
    return {parameter: split.world for split in split_banks(model) for parameter in split.bank.parameters()}
