"""``dist-moe compress``: a run with fewer experts, made of a finished one: calibrate, align, group, merge.

Gates stay as they are, to the bit: each still chooses among as many slots as before, and a slot map leads the slots of
a group to its one expert; the layer computes a token's pairs with the same expert once, with the sum of their weights.
Where experts are pruned instead, their slots are excluded: the gate chooses among the others as if there were no more,
as REAP has it. A slot that led nowhere would take its weight from the token, and one that led to the nearest kept
expert would be a merge by another name.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_moe.config.files import write_json
from dist_moe.engine.checkpoint import ModelWeights, read_model, write_first_checkpoint
from dist_moe.engine.checkpoint.files import checkpoints_of
from dist_moe.engine.checkpoint.format import BUFFER
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.run_lock import held
from dist_moe.errors import UserError
from dist_moe.experts import FeedForwardBank
from dist_moe.gates import Gate
from dist_moe.layer import MoE
from dist_moe.models import MoEModel, MoEModelConfig
from dist_moe.parallel import wait_for_all
from dist_moe.recipes.merge_compress.align import alignment_by_activations
from dist_moe.recipes.merge_compress.calibrate import LayerStatistics, calibrate, layer_inputs
from dist_moe.recipes.merge_compress.group import Leaders, Numbers, global_counts, led_by_usage
from dist_moe.recipes.merge_compress.merge import (
    Match,
    MergedLayer,
    merged_weights,
    orders,
    shares,
    weight_similarity,
)
from dist_moe.recipes.merge_compress.methods import LayerChoice
from dist_moe.recipes.merge_compress.picture import PICTURE, write_picture
from dist_moe.recipes.merge_compress.settings import CompressConfig
from dist_moe.recipes.recipe import validate_config
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.evaluate import TrainedRun, trained_run
from dist_moe.search import SlotTable

REPORT = "compress.json"
_COMPARED = {"folding": "slot maps folded into the routers, on held-out text", "held_out": "on held-out text"}
"""Fields of a report that say how two models differ."""
_BY_LAYER = "experts_by_layer"
"""Field of models whose layers may have different numbers of experts."""


@dataclass(frozen=True)
class Compressed:
    """A model with fewer experts. ``weights``: made as they are read. ``config``: of a supervised run of it.
    ``report``: JSON, see docs/compress.md."""

    weights: ModelWeights
    config: SupervisedConfig
    report: dict[str, Any]


def compress_run(
    run_dir: Path, output: Path, config: CompressConfig, *, allow_changed_data: bool = False
) -> dict[str, Any]:
    """Write ``output``, a run whose model has fewer experts than that of ``run_dir``; return the report.

    ``output`` holds a checkpoint of step 0 without optimizer state, from which training can go on, and the report.
    Collective, at any number of ranks. Raises UserError if the run is not intact, if its experts cannot be merged as
    ``config`` says, if ``output`` holds a run already, and for other data than it was trained on unless
    ``allow_changed_data``.
    """
    environment = LaunchEnvironment.read()
    written = RunDirectory(output)
    check_beside(run_dir, output)
    with held(output, environment, option="OUT"), ExitStack() as stack:
        written.check_unused("OUT")  # on all ranks: nothing is written before they have met
        check = partial(check_merge, merge=config)
        run = stack.enter_context(trained_run(run_dir, allow_changed_data=allow_changed_data, check=check))
        compressed = compress(run, config)
        report = compressed.report | {"changed_data": run.changed_data}
        if environment.is_rank_zero:
            _write(run_dir, compressed, written, report)
        wait_for_all()
    return report


def check_beside(source: Path, output: Path) -> None:
    """Raise UserError for an output within the run of which it is made."""
    if source.resolve() in output.resolve().parents:
        raise UserError(f"OUT {output} lies within RUN {source}, which stays as it is; name a directory beside it")


def compress(run: TrainedRun, merge: CompressConfig) -> Compressed:
    """Return the model of ``run`` with fewer experts; its own ends learning, and forgets slots that are pruned.

    Collective over all ranks, and alike on all. Raises UserError if its experts cannot be merged as ``merge`` says, of
    which :func:`check_merge` knows most.
    """
    merge = merge.settled(can_differ=_BY_LAYER in type(run.config.model).model_fields)
    run.model.end_learning()
    part = getattr(run.task, merge.part)
    statistics = calibrate(run.task, run.model, part, merge.examples, run.groups, outputs=merge.needs_outputs)
    weights = read_model(run.checkpoint)
    matches: dict[str, Match] = {}
    moe_layers = run.model.moe_layers
    if merge.aligns_by_activations:
        inputs = layer_inputs(run.task, run.model, part, merge.examples, run.groups)
        for name, layer in moe_layers.items():
            if isinstance(layer.experts, FeedForwardBank):
                matches[name] = partial(alignment_by_activations, bank=layer.experts, x_TD=inputs[name])
    hidden_axes = {name: layer.experts.hidden_axes for name, layer in moe_layers.items()}
    layers = plan_merge(hidden_axes, statistics, weights, merge, matches)
    config = compressed_config(run, layers, prunes=merge.by.prunes)
    buffers: dict[str, Tensor] = {}
    for name, layer in moe_layers.items():
        assert isinstance(layer.slot_map, SlotTable)
        buffers |= slot_buffers(name, layers[name], layer.slot_map, layer.gates, prunes=merge.by.prunes)
    merged = merged_weights(weights, layers, buffers)
    report = {
        "checkpoint": run.checkpoint.name,
        "compress": merge.model_dump(mode="json") | {"examples": min(merge.examples, len(part))},
        **what_became(weights, merged, layers, statistics, prunes=merge.by.prunes),
    }
    return Compressed(merged, config, report)


def what_became(
    before: ModelWeights,
    after: ModelWeights,
    layers: Mapping[str, MergedLayer],
    statistics: Mapping[str, LayerStatistics],
    *,
    prunes: bool,
) -> dict[str, Any]:
    """Return the part of the report on parameters and on the experts of each layer."""
    return {
        "parameters_before": num_parameters(before),
        "parameters_after": num_parameters(after),
        "layers": [
            {
                "layer": name,
                "leaders": layer.leaders.tolist(),
                "groups": [[leader] for leader in layer.leaders.tolist()] if prunes else layer.groups(),
                "tokens": statistics[name].tokens,
                "usage": statistics[name].usage_E.tolist(),
            }
            for name, layer in layers.items()
        ],
    }


def num_parameters(weights: ModelWeights) -> int:
    """Return the number of parameters, each counted once, as they are stored: merged experts share none."""
    return sum(int(np.prod(spec.shape)) for name, spec in weights.specs.items() if weights.kinds[name] != BUFFER)


def plan_merge(
    hidden_axes: Mapping[str, Mapping[str, int]],
    statistics: Mapping[str, LayerStatistics],
    weights: ModelWeights,
    config: CompressConfig,
    matches: Mapping[str, Match],
) -> dict[str, MergedLayer]:
    """Return what becomes of the experts of each layer, by its name; alike on all ranks.

    ``hidden_axes``: of each layer's bank, see ExpertBank. ``weights``: of the model, wherever they are from.
    ``matches``: of each layer, where units are matched by activations; collective then.
    """
    usage_LE = [of_layer.usage_E for of_layer in statistics.values()]
    planned: dict[str, MergedLayer] = {}
    for (name, seen), count in zip(statistics.items(), _counts(usage_LE, config), strict=True):
        axes = hidden_axes[name] if config.align != "none" and not config.by.prunes else {}
        match = matches.get(name)
        order_EH, similarity_EE = None, None
        if config.align == "first" or (config.compares and config.similarity == "weights"):
            order_EH = orders(weights, name, np.zeros(len(seen.usage_E), dtype=np.int64), axes, match)
        if config.compares:
            similarity_EE = (
                weight_similarity(weights, name, order_EH, axes)
                if config.similarity == "weights"
                else {"router": seen.router_EE, "router_rows": seen.rows_EE, "outputs": seen.output_EE}[
                    config.similarity
                ]
            )
            assert similarity_EE is not None
            if not _tells_apart(similarity_EE, count):
                raise UserError(
                    f"similarity={config.similarity}: no two experts of {name} have anything in common, as where a "
                    "gate sends each token to one expert with all weight; use similarity=outputs or similarity=weights"
                )
        choice = LayerChoice(seen, similarity_EE, count, config.linkage, (config.seed, len(planned)))
        leader_E = _groups(seen, choice, config, len(planned))
        if config.align == "leader":
            order_EH = orders(weights, name, leader_E, axes, match)
        weight_E = np.ones(len(leader_E)) if config.by.plain_means else seen.usage_E
        if config.by.prunes:
            weight_E = np.isin(np.arange(len(leader_E)), leader_E).astype(np.float64)
        planned[name] = MergedLayer(leader_E, shares(leader_E, weight_E), order_EH, axes)
    return planned


def _counts(usage_LE: Sequence[Numbers], config: CompressConfig) -> list[int]:
    """Return how many groups each layer gets."""
    if config.groups is not None:
        return [len(groups) for groups in config.groups]
    assert config.experts is not None
    if config.grouping == "global":
        return global_counts(usage_LE, config.experts, config.excluded_layers)
    return [len(usage_E) if i in config.excluded_layers else config.experts for i, usage_E in enumerate(usage_LE)]


def _tells_apart(similarity_EE: Numbers, count: int) -> bool:
    """Return whether experts that do not lead can be told which leader they are like."""
    experts = len(similarity_EE)
    return count == experts or bool(similarity_EE[~np.eye(experts, dtype=np.bool_)].any())


def _groups(seen: LayerStatistics, choice: LayerChoice, config: CompressConfig, layer: int) -> Leaders:
    if config.groups is None:
        return config.by.groups(choice)
    label_E = np.empty(len(seen.usage_E), dtype=np.int64)
    for label, group in enumerate(config.groups[layer]):
        label_E[list(group)] = label
    return led_by_usage(label_E, seen.usage_E)


def compressed_config(run: TrainedRun, layers: Mapping[str, MergedLayer], *, prunes: bool) -> SupervisedConfig:
    """Return the configuration of a run with fewer experts. Raises UserError if its model cannot have them."""
    model, counts = run.config.model.model_dump(mode="json"), [len(layer.leaders) for layer in layers.values()]
    if model.get("expert_hidden", 0) is None:  # it would follow from the number of experts
        model["expert_hidden"] = next(iter(run.model.moe_layers.values())).experts.get_parameter("up").shape[2]
    model |= mixture_fields(run.config.model, counts, prunes=prunes)
    config = supervised_config(run.config, model)
    config.check(config.parallel.expert_parallel_size)
    return config


def mixture_fields(model: MoEModelConfig, counts: Sequence[int], *, prunes: bool) -> dict[str, Any]:
    """Return the fields of a model's section that change when its layers have ``counts`` experts left."""
    fields: dict[str, Any] = {"num_slots": model.slots_per_gate, "num_experts": max(counts), "permutation": None}
    fields["slot_masks"] = model.slot_masks or prunes
    if _BY_LAYER in type(model).model_fields:
        fields[_BY_LAYER] = list(counts) if len(set(counts)) > 1 else None
    return fields


def supervised_config(config: SupervisedConfig, model: Mapping[str, Any]) -> SupervisedConfig:
    """Return the configuration of supervised training of another ``model``, of which there are weights already.

    The ranks over which experts are split are those of ``config``, or fewer where all of them must have equally many.
    """
    content = config.plain() | {"recipe": {"name": "supervised"}, "start": None, "model": dict(model)}
    supervised: SupervisedConfig = validate_config(content)
    size = gcd(config.parallel.expert_parallel_size, *supervised.model.expert_counts(config.data.target_names).values())
    parallel = supervised.parallel.model_copy(update={"expert_parallel_size": size})
    return supervised.model_copy(update={"parallel": parallel})


def check_merge(config: SupervisedConfig, model: MoEModel, merge: CompressConfig) -> None:
    """Raise UserError for a ``model``, with or without storage, whose experts cannot be merged as ``merge`` says."""
    settings, layers = config.model, model.moe_layers
    gate_name = f"gate.name={settings.gate.name}"
    can_differ = _BY_LAYER in type(settings).model_fields
    merge = merge.settled(can_differ=can_differ)
    head = getattr(settings, "auxiliary_head", None)
    if head is not None:
        raise UserError(f"model.auxiliary_head={head}: a model with a second head cannot be compressed; name another")
    if not layers or not settings.has_tables:
        raise UserError(f"model.name={settings.name}: there are no MoE layers with slot maps in it to compress")
    if settings.low_rank is not None:
        raise UserError("model.low_rank: experts that are factored cannot be merged any more; merge them before")
    for name, layer in layers.items():
        check_layer(name, layer, merge, gate_name)
    experts = {name: layer.experts.num_experts for name, layer in layers.items()}
    check_counts(experts, merge, f"model.name={settings.name}", can_differ=can_differ)


def check_layer(name: str, layer: MoE, merge: CompressConfig, gate_name: str) -> None:
    """Raise UserError for an MoE layer whose experts cannot be merged as ``merge`` says."""
    if not isinstance(layer.slot_map, SlotTable) or layer.slot_map.table.shape[:2] != (1, 1):
        raise UserError(f"{name} has a slot map for each gate or branch; only one for all can be compressed")
    if next(layer.experts.buffers(), None) is not None:
        raise UserError(f"{name}: experts with batch normalisation have statistics that cannot be averaged")
    if merge.by.prunes and not all(gate.can_exclude for gate in layer.each_gate):
        raise UserError(f"method={merge.method}: {gate_name} cannot do without slots; merge them")
    if merge.similarity == "router_rows" and any(gate.rows_ED is None for gate in layer.each_gate):
        raise UserError(f"similarity=router_rows: {gate_name} has no rows; use similarity=router")
    bank = layer.experts
    if merge.aligns_by_activations and bank.hidden_axes and not isinstance(bank, FeedForwardBank):
        raise UserError(f"align_by=activations: {name} has no feed-forward networks; use align_by=weights")


def check_counts(experts: Mapping[str, int], merge: CompressConfig, model: str, *, can_differ: bool) -> None:
    """Raise UserError if layers cannot keep as many experts as ``merge`` says.

    ``experts``: how many each layer has, by its name. ``model``: what to call it. ``can_differ``: whether its layers
    may keep unequally many.
    """
    excluded = set(merge.excluded_layers)
    unequal = {
        f"excluded_layers={sorted(excluded)}": (bool(excluded), "leave it out"),
        "grouping=global": (merge.grouping == "global", "use grouping=uniform"),
        "groups": (len({len(groups) for groups in merge.groups or ()}) > 1, "give as many groups for each"),
    }
    for field, (is_asked, remedy) in unequal.items():
        if is_asked and len(experts) > 1 and not can_differ:
            raise UserError(f"{field}: {model} has as many experts in each layer; {remedy}")
    if not excluded < set(range(len(experts))):
        raise UserError(f"excluded_layers={sorted(excluded)}: allowed: some of 0..{len(experts) - 1}, not all")
    if merge.groups is not None:
        error = merge.group_errors(list(experts.values()))
        if error:
            raise UserError(error)
        return
    assert merge.experts is not None
    counts = {name: count for i, (name, count) in enumerate(experts.items()) if i not in excluded}
    mean = sum(counts.values()) // len(counts)
    if merge.grouping == "global" and merge.experts > mean:
        raise UserError(f"experts={merge.experts}: the model has {mean} a layer; give at most that many")
    for name, count in counts.items():
        if merge.grouping == "uniform" and merge.experts > count:
            raise UserError(f"experts={merge.experts}: {name} has {count}; give at most that many, or exclude it")


def slot_buffers(
    name: str, merged: MergedLayer, slot_map: SlotTable, gates: nn.ModuleList, *, prunes: bool
) -> dict[str, Tensor]:
    """Return the new slot map of a layer and, where experts are pruned, the gates' buffers, which exclude their slots.

    ``slot_map``, ``gates``: of the layer as it is; the gates are changed. Names are those in the model.
    """
    expert_S = slot_map.table.cpu()
    buffers = {f"{name}.slot_map.table": merged.expert_E[expert_S]}
    if not prunes:
        return buffers
    kept_S = torch.isin(expert_S.flatten(), torch.from_numpy(merged.leaders))
    for gate in gates:
        assert isinstance(gate, Gate)
        gate.allow(kept_S if gate.allowed_E is None else kept_S & gate.allowed_E.cpu())
    return buffers | {named: buffer.cpu() for named, buffer in gates.named_buffers(prefix=f"{name}.gates")}


def _write(source: Path, compressed: Compressed, written: RunDirectory, report: Mapping[str, Any]) -> None:
    weights = compressed.weights
    write_first_checkpoint(weights, checkpoints_of(written.root), f"{source.name}, compressed", weights.identity)
    identity = RunDirectory(source).identity
    if identity.is_file():
        shutil.copy(identity, written.root)
    write_json(written.root / REPORT, report)
    write_picture(report, written.root / PICTURE)
    written.describe(compressed.config.plain(), LaunchEnvironment())  # last: its presence makes it a run


def report_text(report: Mapping[str, Any]) -> str:
    """Return the report in words: the groups of each layer with their shares of use, and the parameters."""
    lines = []
    for layer in report["layers"]:
        usage_E = layer["usage"]
        lines.append(f"{layer['layer']}: {len(usage_E)} -> {len(layer['groups'])} experts")
        for leader, group in zip(layer["leaders"], layer["groups"], strict=True):
            share = 100 * sum(usage_E[member] for member in group)
            lines.append(f"  {leader} <- {', '.join(map(str, group))}  ({share:.1f} % of assignments)")
    before, after = report["parameters_before"], report["parameters_after"]
    lines.append(f"{before:,} -> {after:,} parameters ({100 * after / before:.1f} %)")
    for name, text in _COMPARED.items():
        if report.get(name):
            lines.append(difference_text(text, report[name]))
    return "\n".join(lines)


def difference_text(what: str, found: Mapping[str, float]) -> str:
    """Return in words how two models differ; ``found``: see ``compare``."""
    return (
        f"{what}: {found['loss_before']:.4f} -> {found['loss_after']:.4f} nats per token, divergence "
        f"{found['divergence']:.2e} nats, logits differ by {found['mean_difference']:.2e} on average and "
        f"{found['largest_difference']:.2e} at most"
    )
