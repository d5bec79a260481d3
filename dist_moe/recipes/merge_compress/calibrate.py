"""Calibration: how often examples of a task use each expert, and how alike experts are on them.

All numbers are sums over tokens, so that any number of batches and of ranks gives the same. Models route real tokens
only; padding is never seen.

REAP: pruning by the mean, over the tokens of an expert, of its share in the token's weights times the norm of its
result (Lasby et al.: REAP the Experts, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_moe.data.batches import shard_batches, spread_over
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.gates import Gate
from dist_moe.gates.base import gate_dtype
from dist_moe.kernels import sums_at
from dist_moe.layer import MoE, MoEOutput
from dist_moe.models import MoEModel
from dist_moe.parallel import current_world, sum_over_ranks
from dist_moe.recipes.merge_compress.group import Numbers
from dist_moe.recipes.merge_compress.merge import cosines
from dist_moe.recording import recording
from dist_moe.search import SlotTable
from dist_moe.tasks import Task

_TOKENS_AT_ONCE = 1024
"""Tokens of a batch on a rank."""

_TOKENS_TO_ALIGN = 4096
"""Tokens on whose activations hidden units are matched, over all ranks."""

_NUMBERS_AT_ONCE = 1 << 22
"""Numbers, in fp64, of the results of all experts that a rank looks at together."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a layer's experts over the tokens of the calibration.

    ``tokens``: how many they are. ``usage_E``: the share of all assignments that each gets. ``router_EE``: cosines of
    what gates say of experts: of logits, of the weights where a gate has no logits.
    ``rows_EE``: cosines of the gates' rows, None where a gate has none. Where experts' results were asked
    for, else None: ``output_EF``: the mean result of each over all tokens, whoever they are routed to; ``output_EE``:
    cosines of the results; ``reap_E``: REAP's score, 0 for an expert without tokens.
    """

    tokens: int
    usage_E: Numbers
    router_EE: Numbers
    rows_EE: Numbers | None
    output_EF: Numbers | None
    output_EE: Numbers | None
    reap_E: Numbers | None


@torch.no_grad()
def calibrate(
    task: Task, model: MoEModel, part: Any, examples: int, groups: ProcessGroups, *, outputs: bool
) -> dict[str, LayerStatistics]:
    """Return the statistics of each MoE layer over ``examples`` rows of ``part``, evenly spread; alike on all ranks.

    ``outputs``: also of the experts' results, for which each expert computes each token. Collective over all ranks.
    """
    sums = {name: LayerSums(layer, outputs=outputs) for name, layer in model.moe_layers.items()}
    _show(task, model, part, examples, groups, {name: of_layer.see for name, of_layer in sums.items()})
    return {name: of_layer.statistics() for name, of_layer in sums.items()}


@torch.no_grad()
def layer_inputs(task: Task, model: MoEModel, part: Any, examples: int, groups: ProcessGroups) -> dict[str, Tensor]:
    """Return (T, D) tokens of each MoE layer, this rank's share of at most ``_TOKENS_TO_ALIGN``. Collective.

    They are those of the same examples at any number of ranks. On the model's device.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in model.moe_layers}
    hooks = {name: lambda _, inputs, __, into=into: into.append(inputs[0].float()) for name, into in kept.items()}
    _show(task, model, part, min(examples, max(1, _TOKENS_TO_ALIGN // task.tokens_per_example)), groups, hooks)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _show(
    task: Task,
    model: MoEModel,
    part: Any,
    examples: int,
    groups: ProcessGroups,
    hooks: Mapping[str, Callable[..., None]],
) -> None:
    """Send ``examples`` rows of ``part``, evenly spread, through the model; ``hooks`` see the layers of their names."""
    world, rows = current_world(), spread_over(len(part), examples)
    batch_size = max(1, min(task.eval_batch, _TOKENS_AT_ONCE // task.tokens_per_example))
    model.eval()
    model.begin_evaluation()
    with recording(None), ExitStack() as stack:  # gates record training steps only
        for name, layer in model.moe_layers.items():
            stack.callback(layer.register_forward_hook(hooks[name]).remove)
        for index_B in shard_batches(rows, batch_size, rank=world.rank, world_size=world.size):
            model(*part.batch(rows[index_B], rows).to(groups.device).inputs)
            ACTIVITY.beat()


class LayerSums:
    """Sums over the tokens that a layer has seen on this rank; ``see`` is a forward hook of the layer."""

    def __init__(self, layer: MoE, *, outputs: bool) -> None:
        experts, width = layer.experts.num_experts, layer.experts.out_dim
        self._outputs = outputs
        self._rows_EE = router_rows(layer)
        self._parts = -(-_TOKENS_AT_ONCE * experts * width // _NUMBERS_AT_ONCE)
        self._tokens, self._count_E, self._reap_E, self._score_EE, self._output_EE, self._output_EF = (
            torch.zeros(shape, dtype=torch.float64, device=next(layer.experts.parameters()).device)
            for shape in ((), experts, experts, (experts, experts), (experts, experts), (experts, width))
        )

    def see(self, layer: MoE, inputs: tuple[Any, ...], output: MoEOutput) -> None:
        """Add the tokens of a forward pass. Collective over the ranks of the experts if results are asked for."""
        x_TD, ids_T = inputs[0], inputs[1] if len(inputs) > 1 else None
        self._tokens += len(x_TD)
        for gate, route in zip(layer.each_gate, output.routes, strict=True):
            self._count_E += route.tokens_per_slot
            score_TE = expert_scores(layer, gate, x_TD, ids_T)
            self._score_EE += score_TE.T @ score_TE
        if not self._outputs:
            return
        norms = []
        for part_TD in x_TD.tensor_split(self._parts):  # as many on every rank
            result_ETF = layer.all_results(part_TD).transpose(0, 1).double()  # as they are computed: rows are views
            row_EW = result_ETF.flatten(1)
            self._output_EF += result_ETF.sum(dim=1)
            self._output_EE += row_EW @ row_EW.T
            norms.append(result_ETF.norm(dim=2).T)
        norm_TE = torch.cat(norms)
        for route in output.routes:
            sum_T = sums_at(route.weight_N, route.token_N, route.num_tokens)
            share_N = route.weight_N.double() / sum_T[route.token_N]
            self._reap_E.index_add_(0, route.slot_N, share_N * norm_TE[route.token_N, route.slot_N])

    def statistics(self) -> LayerStatistics:
        """Return what the sums over all ranks say. Collective over all ranks."""
        tokens, count_E, reap_E, score_EE, output_EE, output_EF = (
            sum_over_ranks(x).cpu()
            for x in (self._tokens, self._count_E, self._reap_E, self._score_EE, self._output_EE, self._output_EF)
        )
        usage_E = (count_E / count_E.sum().clamp_min(1)).numpy()
        if not self._outputs:
            return LayerStatistics(int(tokens), usage_E, cosines(score_EE), self._rows_EE, None, None, None)
        mean_EF, reap_E = output_EF / tokens.clamp_min(1), reap_E / count_E.clamp_min(1)
        return LayerStatistics(
            int(tokens),
            usage_E,
            cosines(score_EE),
            self._rows_EE,
            mean_EF.numpy(),
            cosines(output_EE),
            reap_E.numpy(),
        )


def expert_scores(layer: MoE, gate: Gate, x_TD: Tensor, ids_T: Tensor | None) -> Tensor:
    """Return (T, E) fp64: what ``gate`` says of each expert, summed over its slots; nothing (0) for excluded slots."""
    with torch.autocast(x_TD.device.type, enabled=False):
        rows_TD = x_TD.to(gate_dtype(x_TD))
        logit_TS = gate.logits(rows_TD)
        score_TS = gate.mixture(rows_TD, ids_T).weight_TKE.sum(1) if logit_TS is None else logit_TS
    return _by_expert(layer, score_TS.double().masked_fill(score_TS == -torch.inf, 0))


@torch.no_grad()
def router_rows(layer: MoE) -> Numbers | None:
    """Return (E, E) cosines of the gates' rows, summed over an expert's slots, or None if a gate has no rows."""
    product_EE = torch.zeros((), dtype=torch.float64)
    for gate in layer.each_gate:
        if gate.rows_ED is None:
            return None
        row_DS = gate.rows_ED.double().T
        row_DE = _by_expert(layer, row_DS if gate.allowed_E is None else row_DS * gate.allowed_E)
        product_EE = product_EE + (row_DE.T @ row_DE).cpu()
    return cosines(product_EE)


def _by_expert(layer: MoE, score_TS: Tensor) -> Tensor:
    """Return (T, E) sums over the slots of each expert."""
    if not isinstance(layer.slot_map, SlotTable):
        return score_TS
    expert_S = layer.slot_map.table.flatten()  # one table: others are refused
    return score_TS.new_zeros(len(score_TS), layer.experts.num_experts).index_add(1, expert_S, score_TS)
