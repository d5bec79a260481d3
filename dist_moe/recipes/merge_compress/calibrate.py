"""Calibration: how often examples of a task use each expert, and how alike experts are on them.

All numbers are sums over tokens, so that any number of batches and of ranks gives the same. Models route real tokens
only; padding is never seen.

REAP: pruning by the mean, over the tokens of an expert, of its share in the token's weights times the norm of its
result (Lasby et al.: REAP the Experts, 2025).
"""

from __future__ import annotations

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

_NUMBERS_AT_ONCE = 1 << 22
"""Numbers, in fp64, of the results of all experts that a rank looks at together."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of a layer's experts over the tokens of the calibration.

    ``tokens``: how many they are. ``usage_E``: the share of all assignments that each gets. ``router_EE``: cosines of
    what gates say of experts: of logits, of the weights where a gate has no logits. Where experts' results were asked
    for, else None: ``output_EF``: the mean result of each over all tokens, whoever they are routed to; ``output_EE``:
    cosines of the results; ``reap_E``: REAP's score, 0 for an expert without tokens.
    """

    tokens: int
    usage_E: Numbers
    router_EE: Numbers
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
    world, rows = current_world(), spread_over(len(part), examples)
    batch_size = max(1, min(task.eval_batch, _TOKENS_AT_ONCE // task.tokens_per_example))
    model.eval()
    model.begin_evaluation()
    with recording(None), ExitStack() as stack:  # gates record training steps only
        sums = {name: LayerSums(layer, outputs=outputs) for name, layer in model.moe_layers.items()}
        for name, layer in model.moe_layers.items():
            stack.callback(layer.register_forward_hook(sums[name].see).remove)
        for index_B in shard_batches(rows, batch_size, rank=world.rank, world_size=world.size):
            model(*part.batch(rows[index_B], rows).to(groups.device).inputs)
            ACTIVITY.beat()
    return {name: of_layer.statistics() for name, of_layer in sums.items()}


class LayerSums:
    """Sums over the tokens that a layer has seen on this rank; ``see`` is a forward hook of the layer."""

    def __init__(self, layer: MoE, *, outputs: bool) -> None:
        experts, width = layer.experts.num_experts, layer.experts.out_dim
        self._outputs = outputs
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
            result_TEF = layer.all_results(part_TD).double()
            self._output_EF += result_TEF.sum(dim=0)
            self._output_EE += torch.einsum("tef,tgf->eg", result_TEF, result_TEF)
            norms.append(result_TEF.norm(dim=2))
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
            return LayerStatistics(int(tokens), usage_E, cosines(score_EE), None, None, None)
        mean_EF, reap_E = output_EF / tokens.clamp_min(1), reap_E / count_E.clamp_min(1)
        return LayerStatistics(
            int(tokens), usage_E, cosines(score_EE), mean_EF.numpy(), cosines(output_EE), reap_E.numpy()
        )


def expert_scores(layer: MoE, gate: Gate, x_TD: Tensor, ids_T: Tensor | None) -> Tensor:
    """Return (T, E) fp64: what ``gate`` says of each expert, summed over its slots; nothing (0) for excluded slots."""
    with torch.autocast(x_TD.device.type, enabled=False):
        rows_TD = x_TD.to(gate_dtype(x_TD))
        logit_TS = gate.logits(rows_TD)
        score_TS = gate.mixture(rows_TD, ids_T).weight_TKE.sum(1) if logit_TS is None else logit_TS
    score_TS = score_TS.double().masked_fill(score_TS == -torch.inf, 0)
    if not isinstance(layer.slot_map, SlotTable):
        return score_TS
    expert_S = layer.slot_map.table.flatten()  # one table: others are refused
    return score_TS.new_zeros(len(x_TD), layer.experts.num_experts).index_add(1, expert_S, score_TS)
