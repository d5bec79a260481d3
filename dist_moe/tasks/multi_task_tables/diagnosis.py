"""Diagnoses of multi-task mixtures while they are evaluated: the three that HoME made.

HoME (Kuaishou, arXiv 2408.05430, 2024) found in MMoE and PLE at work: *collapse*, experts whose results have very
different scales, or are almost all zero under ReLU; *degradation*, a shared expert that one target has to itself;
*underfitting*, targets that hardly use the experts of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dist_moe.data.tables import RowTable, Target
from dist_moe.experts import ExpertBank
from dist_moe.kernels import group_of_each_row
from dist_moe.layer import MoE
from dist_moe.models import ModelOutput, MoEModel
from dist_moe.models.multi_task.levels import SHARED, LevelGate
from dist_moe.parallel import FlatExchange, sum_over_ranks
from dist_moe.tasks.multi_task_tables.metrics import calibration_bins, labels_of
from dist_moe.tasks.task import Columns, Watch


class TableWatch(Watch):
    """Adds up what each layer's experts give, and each gate's weights on them, over the rows that are evaluated."""

    def __init__(self, model: MoEModel, targets: Sequence[Target]) -> None:
        super().__init__()
        self._targets = targets
        names = [target.name for target in targets]
        self._layers = {name: _LayerSums(layer, *_names(layer, names)) for name, layer in model.moe_layers.items()}
        for sums, layer in zip(self._layers.values(), model.moe_layers.values(), strict=True):
            self.callback(setattr, layer, "exchange", layer.exchange)
            layer.exchange = FlatExchange(layer.world)  # in chunks the bank would not know whose rows it has
            self.callback(layer.experts.register_forward_hook(sums.add_results).remove)

    def see(self, output: ModelOutput) -> None:
        """Add the gates' weights of a batch; the experts' results are added as they are computed."""
        for sums, layer in zip(self._layers.values(), output.layers, strict=True):
            sums.rows = sums.rows + len(output.predictions[0])
            for weight_E, route in zip(sums.weight_GE, layer.routes, strict=True):
                weight_E.index_add_(0, route.slot_N, route.weight_N.double())

    def end(self, columns: Columns, part: RowTable) -> dict[str, Any]:
        """Return the diagnoses, and of each binary target the bins of its calibration. Collective over all ranks.

        ``experts``: by layer and expert ``zero_share``, of the numbers in its results those that are 0, ``mean`` and
        ``std`` of them, and by gate ``gate_weight``, the mean weight on it. In a number each, over all layers:
        ``dead_activations``, the largest share of zeros; ``scale_ratio``, the largest ``std`` of an expert over the
        least of one in its layer; ``captured``, the largest share that a target (or group of targets) has of all
        weight on a shared expert; ``own_share``, the least share of a target's (or group's) weight that goes to
        experts of its own.
        """
        found: dict[str, Any] = {name: sums.end() for name, sums in self._layers.items()}
        headlines: dict[str, float] = {}
        for sums in self._layers.values():
            for name, value in sums.headlines().items():
                worst = min if name == "own_share" else max
                headlines[name] = worst(value, headlines.get(name, value))
        bins = {}
        for one, column_N in zip(labels_of(part, self._targets), columns, strict=True):
            if one.target.kind == "binary":
                predicted, observed, weight = calibration_bins(column_N[one.rows_N], one.label_R, one.weight_R)
                lists = {"predicted": predicted.tolist(), "observed": observed.tolist(), "weight": weight.tolist()}
                bins[one.target.name] = lists
        return headlines | {"experts": found, "calibration_bins": bins}


class _LayerSums:
    """Sums over the rows of a layer: of its experts' results, of its gates' weights, by global id of the expert."""

    def __init__(self, layer: MoE, gates: Sequence[str], owners: Sequence[str]) -> None:
        self.gates, self.owners = gates, owners
        nothing = torch.zeros((), dtype=torch.float64, device=next(layer.parameters()).device)
        self.results_E4 = nothing.repeat(layer.experts.num_experts, 4)  # numbers, zeros, sum, sum of squares
        self.weight_GE = nothing.repeat(len(layer.gates), layer.experts.num_experts)
        self.rows = nothing

    def add_results(self, bank: ExpertBank, arguments: tuple[Any, ...], result_NF: Tensor) -> None:
        """Add the rows of a pass of the bank: a forward hook."""
        rows_E = torch.as_tensor(arguments[1], device=result_NF.device)
        ids_E = torch.tensor(bank.expert_ids, device=result_NF.device)
        x_NF = result_NF.detach().double()
        sums = [torch.ones_like(x_NF), x_NF == 0, x_NF, x_NF.square()]
        sums_N4 = torch.stack([x.sum(dim=1) for x in sums], dim=1).to(x_NF)
        self.results_E4.index_add_(0, ids_E[group_of_each_row(rows_E, len(x_NF))], sums_N4)

    def end(self) -> dict[str, Any]:
        """Return what is known of each expert, by names, over the rows of all ranks. Collective."""
        results_E4, self.weight_GE = sum_over_ranks(self.results_E4), sum_over_ranks(self.weight_GE)
        self.weight_GE /= sum_over_ranks(self.rows).clamp(min=1)
        count_E, zeros_E, sum_E, squares_E = results_E4.unbind(1)
        mean_E = sum_E / count_E
        self.zeros_E, self.std_E = zeros_E / count_E, (squares_E / count_E - mean_E.square()).clamp(min=0).sqrt()
        names = [f"{owner}_{self.owners[:i].count(owner)}" for i, owner in enumerate(self.owners)]
        columns = {"zero_share": self.zeros_E, "mean": mean_E, "std": self.std_E}
        numbers = {column: dict(zip(names, x_E.tolist(), strict=True)) for column, x_E in columns.items()}
        weights = [dict(zip(names, weight_E, strict=True)) for weight_E in self.weight_GE.tolist()]
        return numbers | {"gate_weight": dict(zip(self.gates, weights, strict=True))}

    def headlines(self) -> dict[str, float]:
        """Return the numbers of the layer that :meth:`TableWatch.end` explains, of those experts that had rows."""
        seen_E = ~self.std_E.isnan()
        found = {}
        if seen_E.any():
            std_E = self.std_E[seen_E]
            found = {
                "dead_activations": float(self.zeros_E[seen_E].max()),
                "scale_ratio": float(std_E.max() / std_E.min().clamp(min=torch.finfo(torch.float32).tiny)),
            }
        asking = [gate != SHARED for gate in self.gates]
        shared = [owner == SHARED for owner in self.owners]
        weight_GE = self.weight_GE[asking]
        if any(shared) and len(weight_GE) > 1:
            weight_GE = weight_GE[:, shared]
            found["captured"] = float((weight_GE.max(dim=0).values / weight_GE.sum(dim=0).clamp(min=1e-30)).max())
        own = [
            sum(w for w, owner in zip(weight_E, self.owners, strict=True) if owner == gate) / max(sum(weight_E), 1e-30)
            for gate, weight_E in zip(self.gates, self.weight_GE.tolist(), strict=True)
            if gate != SHARED and gate in self.owners
        ]
        return found | ({"own_share": min(own)} if own else {})


def _names(layer: MoE, targets: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return the names of a layer's gates, and of the owner of each of its experts."""
    gates = [gate for gate in layer.each_gate if isinstance(gate, LevelGate)]
    if gates:
        return [gate.output.name for gate in gates], gates[0].shape.owner_of_expert
    return targets, [SHARED] * layer.experts.num_experts
