"""HoME's three diagnoses, of any model with MoE layers: do experts collapse, degenerate, or starve?

    with watching_experts(model) as watch:
        for batch in batches:
            model(*batch.inputs)
    for layer, found in watch.statistics().items(): ...

Collapse: experts' outputs of very different scale, or nearly all 0. Degeneration: a shared expert that a single target
has for itself. Underfitting: targets that ignore their own experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.experts import ExpertBank
from dist_moe.kernels import group_of_each_row, sums_at
from dist_moe.layer import MoE, MoEOutput
from dist_moe.models.multi_task.levels import LevelGate
from dist_moe.parallel import FlatExchange, sum_over_ranks
from dist_moe.search.layers import moe_layers


@dataclass(frozen=True)
class ExpertStatistics:
    """What a layer's experts gave, over all ranks and batches; NaN for an expert without rows.

    ``rows_E``: how many rows each had. ``mean_E``, ``std_E``, ``zero_share_E``: of the numbers in its results; the
    share that is exactly 0. ``weight_GE``: of each gate on each expert, the mean over examples, 0 where it is not
    chosen.
    """

    rows_E: Tensor
    mean_E: Tensor
    std_E: Tensor
    zero_share_E: Tensor
    weight_GE: Tensor


class ExpertWatch:
    """Adds up what the experts of ``layers``, by name, give and what the gates weigh."""

    def __init__(self, layers: dict[str, MoE]) -> None:
        self._layers = layers
        device = next((p.device for layer in layers.values() for p in layer.parameters()), None)
        wide = partial(torch.zeros, dtype=torch.float64, device=device)
        self._sums = {name: wide(layer.experts.num_experts, 4) for name, layer in layers.items()}
        self._weights = {name: wide(len(layer.gates) + 1, len(self._sums[name])) for name, layer in layers.items()}

    @torch.no_grad()
    def see_experts(self, name: str, bank: ExpertBank, inputs: tuple[Any, ...], result_NF: Tensor) -> None:
        """Take the results of this rank's experts of a layer on their rows: a hook of the bank."""
        counts_E, y_NF = torch.as_tensor(inputs[1], device=result_NF.device), result_NF.double()
        id_N = torch.tensor(bank.expert_ids, device=y_NF.device)[group_of_each_row(counts_E, len(y_NF))]
        of_row = torch.stack([torch.ones_like(y_NF), y_NF, y_NF.square(), (y_NF == 0).double()], dim=1).sum(dim=2)
        self._sums[name] += sums_at(of_row, id_N, len(self._sums[name]))

    @torch.no_grad()
    def see_gates(self, name: str, layer: MoE, _: Any, output: MoEOutput) -> None:
        """Take the routes of a layer: a hook of it."""
        weights, num_experts = self._weights[name], layer.experts.num_experts
        for weight_E, route in zip(weights[:-1], output.routes, strict=True):
            weight_E += sums_at(route.weight_N.double(), route.slot_N, num_experts)
        first = layer.gates[0]
        weights[-1] += output.routes[0].num_tokens // (first.streams if isinstance(first, LevelGate) else 1)

    def statistics(self) -> dict[str, ExpertStatistics]:
        """Return the statistics by the layers' names. Collective over all ranks."""
        found = {}
        for name, layer in self._layers.items():
            count_E, sum_E, squares_E, zeros_E = sum_over_ranks(self._sums[name]).unbind(1)
            *weights, examples_E = sum_over_ranks(self._weights[name])
            mean_E = sum_E / count_E
            std_E = (squares_E / count_E - mean_E.square()).clamp(min=0).sqrt()
            rows_E = count_E / layer.experts.out_dim
            found[name] = ExpertStatistics(rows_E, mean_E, std_E, zeros_E / count_E, torch.stack(weights) / examples_E)
        return found


@contextmanager
def watching_experts(model: nn.Module) -> Iterator[ExpertWatch]:
    """Watch all experts and gates of ``model`` within the context, in which rows travel all at once."""
    layers = moe_layers(model)
    watch = ExpertWatch(layers)
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(setattr, layer, "exchange", layer.exchange)
            layer.exchange = FlatExchange(layer.world)
            for module, see in ((layer.experts, watch.see_experts), (layer, watch.see_gates)):
                stack.callback(module.register_forward_hook(partial(see, name)).remove)
        yield watch
