"""Slot maps folded into routers: one row per expert, for architectures whose gates choose among experts.

Pruning leaves the rows of the kept experts, and the gate chooses among them as it did: nothing changes. The share of
merged experts is the sum of the shares of their slots, whose logit is the log-sum-exp of the slots' logits: not linear
in the token. Its row is fitted to that by least squares over the tokens of a text, near the mean of the slots' rows
weighted by their router probabilities: argmin over w of sum_T (w x - logsumexp_S(w_S x))^2 + r |w - mean|^2, r a
thousandth of the mean square of a feature summed over tokens. Also, a token now gets k different experts, where before
several of its k slots could lead to the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_moe.data.batches import Examples, spread_over
from dist_moe.engine.checkpoint import ModelWeights
from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec
from dist_moe.errors import UserError
from dist_moe.gates import TopKConfig
from dist_moe.gates.base import gate_dtype
from dist_moe.gates.top_k import TopK
from dist_moe.layer import MoE
from dist_moe.models import RunShape, TransformerConfig
from dist_moe.models.layer_stream import Flow, each_layer
from dist_moe.models.transformer import DecoderLayer
from dist_moe.search import SlotTable

RIDGE = 1e-3


@dataclass(frozen=True)
class StoredDecoder:
    """A decoder whose weights are read when they are asked for. ``run``: what its gates need to know."""

    config: TransformerConfig
    weights: ModelWeights
    run: RunShape

    @property
    def moe_layers(self) -> list[str]:
        """The names of the MoE layers, in order."""
        return [f"layers.{i}.moe" for i in range(self.config.layers) if self.config.has_experts(i)]


def has_maps(config: TransformerConfig) -> bool:
    """Return whether a gate of the model chooses among other than all experts, one slot each."""
    return config.slot_masks or config.experts_by_layer is not None or config.slots_per_gate != config.num_experts


def fold(model: StoredDecoder, token_NS: Tensor) -> tuple[StoredDecoder, bool]:
    """Return the model with a slot for each expert, and whether it computes the same.

    ``token_NS``: the text on which rows of merged experts are fitted, N sequences of S tokens. Raises UserError for
    another gate than Top-k without bias, and for layers of different numbers of experts.
    """
    config, gate = model.config, model.config.gate
    if not isinstance(gate, TopKConfig) or gate.bias or gate.noise or gate.bias_update_rate:
        raise UserError(f"model.gate.name={gate.name}: only a Top-k router without bias or noise can be folded")
    if config.experts_by_layer is not None:
        raise UserError(
            f"model.experts_by_layer={list(config.experts_by_layer)}: stock architectures have equally many "
            "experts in all layers; compress with --grouping uniform"
        )
    slots = {layer: _slots(model.weights, layer) for layer in model.moe_layers}
    exact = all(len(of_expert) == 1 for of_layer in slots.values() for of_expert in of_layer)
    k = min(gate.k, config.num_experts)
    changes = {"num_slots": None, "slot_masks": False, "gate": gate.model_copy(update={"k": k})}
    folded = config.model_copy(update=changes)
    if exact:
        rows = {layer: model.weights[f"{layer}.gates.0.weight"][torch.cat(slots[layer])] for layer in slots}
    else:
        rows = _fitted(model, folded, slots, token_NS)
    return StoredDecoder(folded, _with_rows(model.weights, rows), model.run), exact


def _slots(weights: ModelWeights, layer: str) -> list[Tensor]:
    """Return the slots of each expert that the gate may choose."""
    expert_S = weights[f"{layer}.slot_map.table"].flatten()
    mask = f"{layer}.gates.0.allowed_E"
    allowed_S = weights[mask] if mask in weights else torch.ones_like(expert_S, dtype=torch.bool)
    found = [torch.nonzero((expert_S == expert) & allowed_S).flatten() for expert in range(int(expert_S.max()) + 1)]
    if not all(map(len, found)):
        raise UserError(f"{layer} has experts to which no slot leads; a router without slot maps would choose them")
    return found


def _fitted(
    model: StoredDecoder, folded: TransformerConfig, slots: dict[str, list[Tensor]], token_NS: Tensor
) -> dict[str, Tensor]:
    """Return (E, D) rows of each layer, fitted to what the layers folded before make of the text."""
    flow, rows = Flow.begin(model.config, model.weights, token_NS), {}

    def visit(index: int, layer: DecoderLayer) -> None:
        if layer.moe is not None:
            name = f"layers.{index}.moe"
            rows[name] = fit_rows(layer, flow, slots[name])
            layer.moe = _with_gate(layer.moe, _gate_of(folded, rows[name]))
        flow.advance(layer)

    each_layer(model.config, model.weights, model.run, visit)
    return rows


@torch.no_grad()
def fit_rows(layer: DecoderLayer, flow: Flow, slots: list[Tensor]) -> Tensor:
    """Return (E, D) rows for the experts of a layer, given the sequences before it and the slots of each expert."""
    assert layer.moe is not None
    gate = layer.moe.each_gate[0]
    assert isinstance(gate, TopK)
    weight_SD = gate.weight.double()
    merged = [expert for expert, of_expert in enumerate(slots) if len(of_expert) > 1]
    table_2SP, inputs = flow.table(), []
    usage_S = weight_SD.new_zeros(len(weight_SD))
    for rows in flow.batches():
        x_TD = layer.attend(flow.x_NSD[rows], table_2SP)[1].flatten(0, 1)
        inputs.append(x_TD.to(gate_dtype(x_TD)))
        usage_S += gate.logits(inputs[-1]).double().softmax(dim=1).sum(dim=0)
    mean_ED = torch.stack(
        [(usage_S[s] / usage_S[s].sum()) @ weight_SD[s] if len(s) > 1 else weight_SD[s[0]] for s in slots]
    )
    gram_DD = weight_SD.new_zeros(weight_SD.shape[1], weight_SD.shape[1])
    rest_DM = weight_SD.new_zeros(weight_SD.shape[1], len(merged))
    for x_TD in inputs:
        logit_TS = gate.logits(x_TD).double()
        target_TM = torch.stack([logit_TS[:, slots[expert]].logsumexp(dim=1) for expert in merged], dim=1)
        gram_DD += x_TD.double().T @ x_TD.double()
        rest_DM += x_TD.double().T @ (target_TM - x_TD.double() @ mean_ED[merged].T)
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    mean_ED[merged] += torch.linalg.solve(gram_DD, rest_DM).T
    return mean_ED.to(gate.weight.dtype)


def _with_gate(moe: MoE, gate: TopK) -> MoE:
    """Return the same experts behind a gate that has a slot for each."""
    return MoE([gate], moe.experts, SlotTable(moe.experts.num_experts), shared=moe.shared).eval()


def _gate_of(config: TransformerConfig, row_ED: Tensor) -> TopK:
    assert isinstance(config.gate, TopKConfig)
    gate = TopK(row_ED.shape[1], len(row_ED), **config.gate.model_dump(exclude={"name"}))
    with torch.no_grad():
        gate.weight.copy_(row_ED)
    return gate


def _with_rows(weights: ModelWeights, rows: dict[str, Tensor]) -> ModelWeights:
    """Return the weights with other routers, and with slot maps that lead from each slot to its own expert."""
    new: dict[str, Tensor] = {}
    for layer, row_ED in rows.items():
        new[f"{layer}.gates.0.weight"] = row_ED.to(weights.specs[f"{layer}.gates.0.weight"].dtype)
        new[f"{layer}.slot_map.table"] = torch.arange(len(row_ED)).view(1, 1, -1)
    masks = {f"{layer}.gates.0.allowed_E" for layer in rows}
    kinds = {name: kind for name, kind in weights.kinds.items() if name not in masks}
    specs = {name: TensorSpec.of(new[name]) if name in new else weights.specs[name] for name in kinds}
    return replace(
        weights, kinds=kinds, specs=specs, read=lambda name, e: new[name] if name in new else weights.read(name, e)
    )


def some_tokens(part: Examples[Any], sequences: int) -> tuple[Tensor, Tensor]:
    """Return (N, S) tokens of at most so many sequences of a text, evenly spread, and (N, S) tokens that follow."""
    rows = spread_over(len(part), sequences)
    batch = part.batch(rows, rows)
    return batch.token_BS, batch.target_BS


@torch.no_grad()
def compare(before: StoredDecoder, after: StoredDecoder, token_NS: Tensor, target_NS: Tensor) -> dict[str, float]:
    """Return how two models differ on a text, layer by layer: what they say of every next token.

    ``loss_before``, ``loss_after``: nats per token; ``divergence``: mean KL divergence of the tokens' distributions in
    nats, before from after; ``mean_difference``, ``largest_difference``: of logits.
    """
    flows = [Flow.begin(model.config, model.weights, token_NS) for model in (before, after)]
    for model, flow in zip((before, after), flows, strict=True):
        each_layer(model.config, model.weights, model.run, lambda _, layer, flow=flow: flow.advance(layer))  # type: ignore[misc]
    sums, largest, count = torch.zeros(4, dtype=torch.float64), 0.0, 0
    logits = (flow.logits(model.weights) for model, flow in zip((before, after), flows, strict=True))
    for rows, one_BSV, other_BSV in zip(flows[0].batches(), *logits, strict=True):
        one, other = one_BSV.flatten(0, 1), other_BSV.flatten(0, 1)
        log_one, log_other = one.double().log_softmax(1), other.double().log_softmax(1)
        target_T = target_NS[rows].flatten()
        difference_T = (one - other).abs().double()
        sums += torch.stack(
            [
                F.nll_loss(log_one, target_T, reduction="sum"),
                F.nll_loss(log_other, target_T, reduction="sum"),
                F.kl_div(log_other, log_one, log_target=True, reduction="sum"),
                difference_T.mean(dim=1).sum(),
            ]
        )
        largest = max(largest, float(difference_T.max()))
        count += len(target_T)
    names = ("loss_before", "loss_after", "divergence", "mean_difference")
    return dict(zip(names, (sums / count).tolist(), strict=True)) | {"largest_difference": largest}
