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
from dist_moe.gates import Gate
from dist_moe.layer import MoE
from dist_moe.models import MoEModelConfig
from dist_moe.parallel import wait_for_all
from dist_moe.recipes.merge_compress.calibrate import LayerStatistics, calibrate
from dist_moe.recipes.merge_compress.group import (
    Leaders,
    Numbers,
    clusters,
    global_counts,
    join_leaders,
    largest,
    random_groups,
)
from dist_moe.recipes.merge_compress.merge import MergedLayer, merged_weights, orders, shares, weight_similarity
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
    if run_dir.resolve() in output.resolve().parents:
        raise UserError(f"OUT {output} lies within RUN {run_dir}, which stays as it is; name a directory beside it")
    with held(output, environment, option="OUT"), ExitStack() as stack:
        written.check_unused("OUT")  # on all ranks: nothing is written before they have met
        run = stack.enter_context(trained_run(run_dir, allow_changed_data=allow_changed_data))
        config = config.settled(can_differ=_BY_LAYER in type(run.config.model).model_fields)
        _check(run, config)
        run.model.end_learning()
        part = getattr(run.task, config.part)
        statistics = calibrate(run.task, run.model, part, config.examples, run.groups, outputs=config.needs_outputs)
        weights = read_model(run.checkpoint)
        moe_layers = run.model.moe_layers
        hidden_axes = {name: layer.experts.hidden_axes for name, layer in moe_layers.items()}
        layers = plan_merge(hidden_axes, statistics, weights, config)
        new_config = compressed_config(run, layers, prunes=config.prunes)
        buffers: dict[str, Tensor] = {}
        for name, layer in moe_layers.items():
            assert isinstance(layer.slot_map, SlotTable)
            buffers |= slot_buffers(name, layers[name], layer.slot_map, layer.gates, prunes=config.prunes)
        compressed = merged_weights(weights, layers, buffers)
        report = {
            "checkpoint": run.checkpoint.name,
            "changed_data": run.changed_data,
            "compress": config.model_dump(mode="json") | {"examples": min(config.examples, len(part))},
            **what_became(weights, compressed, layers, statistics, prunes=config.prunes),
        }
        if environment.is_rank_zero:
            _write(run_dir, compressed, new_config, written, report)
        wait_for_all()
    return report


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
) -> dict[str, MergedLayer]:
    """Return what becomes of the experts of each layer, by its name; alike on all ranks.

    ``hidden_axes``: of each layer's bank, see ExpertBank. ``weights``: of the model, wherever they are from.
    """
    usage_LE = [of_layer.usage_E for of_layer in statistics.values()]
    counts = [len(usage_E) if i in config.excluded_layers else config.experts for i, usage_E in enumerate(usage_LE)]
    if config.grouping == "global":
        counts = global_counts(usage_LE, config.experts, config.excluded_layers)
    planned: dict[str, MergedLayer] = {}
    for (name, seen), count in zip(statistics.items(), counts, strict=True):
        axes = hidden_axes[name] if config.align != "none" and not config.prunes else {}
        order_EH = None
        if config.align == "first" or config.similarity == "weights":
            order_EH = orders(weights, name, np.zeros(len(seen.usage_E), dtype=np.int64), axes)
        similarity_EE = seen.router_EE if seen.output_EE is None or config.similarity != "outputs" else seen.output_EE
        if config.similarity == "weights":
            similarity_EE = weight_similarity(weights, name, order_EH, axes)
        if config.joins and not _tells_apart(similarity_EE, count):
            raise UserError(
                f"similarity={config.similarity}: no two experts of {name} have anything in common, as where a gate "
                "sends each token to one expert with all weight; use similarity=outputs or similarity=weights"
            )
        leader_E = _groups(seen, similarity_EE, count, config, seed=(config.seed, len(planned)))
        if config.align == "leader":
            order_EH = orders(weights, name, leader_E, axes)
        weight_E = np.ones(len(leader_E)) if config.method == "uniform" else seen.usage_E
        if config.prunes:
            weight_E = np.isin(np.arange(len(leader_E)), leader_E).astype(np.float64)
        planned[name] = MergedLayer(leader_E, shares(leader_E, weight_E), order_EH, axes)
    return planned


def _tells_apart(similarity_EE: Numbers, count: int) -> bool:
    """Return whether experts that do not lead can be told which leader they are like."""
    experts = len(similarity_EE)
    return count == experts or bool(similarity_EE[~np.eye(experts, dtype=np.bool_)].any())


def _groups(
    seen: LayerStatistics, similarity_EE: Numbers, count: int, config: CompressConfig, seed: tuple[int, int]
) -> Leaders:
    if config.method == "hc_smoe":
        assert seen.output_EF is not None
        return clusters(seen.output_EF, count, seen.usage_E, config.linkage)
    if config.method == "random":
        return random_groups(count, seen.usage_E, seed)
    score_E = seen.reap_E if config.method == "reap" else seen.usage_E
    assert score_E is not None
    return join_leaders(largest(score_E, count), similarity_EE)


def compressed_config(run: TrainedRun, layers: Mapping[str, MergedLayer], *, prunes: bool) -> SupervisedConfig:
    """Return the configuration of the run with fewer experts. Raises UserError if its model cannot have them."""
    content = run.config.plain()
    model, counts = content["model"], [len(layer.leaders) for layer in layers.values()]
    if model.get("expert_hidden", 0) is None:  # it would follow from the number of experts
        model["expert_hidden"] = next(iter(run.model.moe_layers.values())).experts.get_parameter("up").shape[2]
    model |= mixture_fields(run.config.model, counts, prunes=prunes)
    parallel = content["parallel"]  # several ranks must have equally many experts
    parallel["expert_parallel_size"] = gcd(parallel["expert_parallel_size"], *counts)
    config: SupervisedConfig = validate_config(content)
    config.check(config.parallel.expert_parallel_size)
    return config


def mixture_fields(model: MoEModelConfig, counts: Sequence[int], *, prunes: bool) -> dict[str, Any]:
    """Return the fields of a model's section that change when its layers have ``counts`` experts left."""
    fields: dict[str, Any] = {"num_slots": model.slots_per_gate, "num_experts": max(counts), "permutation": None}
    fields["slot_masks"] = model.slot_masks or prunes
    if _BY_LAYER in type(model).model_fields:
        fields[_BY_LAYER] = list(counts) if len(set(counts)) > 1 else None
    return fields


def _check(run: TrainedRun, config: CompressConfig) -> None:
    """Raise UserError for a model whose experts cannot be merged, or not as ``config`` says."""
    model, layers = run.config.model, run.model.moe_layers
    if run.config.recipe.name != "supervised":
        raise UserError(f"recipe.name={run.config.recipe.name}: only supervised runs can be compressed so far")
    if not layers or not model.has_tables:
        raise UserError(f"model.name={model.name}: there are no MoE layers with slot maps in it to compress")
    if model.low_rank is not None:
        raise UserError("model.low_rank: experts that are factored cannot be merged any more; merge them before")
    for name, layer in layers.items():
        check_layer(name, layer, config)
    can_differ = len(layers) == 1 or _BY_LAYER in type(model).model_fields
    check_counts({name: layer.experts.num_experts for name, layer in layers.items()}, config, can_differ=can_differ)


def check_layer(name: str, layer: MoE, config: CompressConfig) -> None:
    """Raise UserError for an MoE layer whose experts cannot be merged, or not as ``config`` says."""
    if not isinstance(layer.slot_map, SlotTable) or layer.slot_map.table.shape[:2] != (1, 1):
        raise UserError(f"{name} has a slot map for each gate or branch; only one for all can be compressed")
    if next(layer.experts.buffers(), None) is not None:
        raise UserError(f"{name}: experts with batch normalisation have statistics that cannot be averaged")
    if config.prunes and not all(gate.can_exclude for gate in layer.each_gate):
        raise UserError(f"method={config.method}: {name} has a gate that cannot do without slots; merge them")


def check_counts(experts: Mapping[str, int], config: CompressConfig, *, can_differ: bool) -> None:
    """Raise UserError if layers cannot keep as many experts as ``config`` says.

    ``experts``: how many each layer has, by its name. ``can_differ``: whether layers may keep unequally many.
    """
    excluded = set(config.excluded_layers)
    if (excluded or config.grouping == "global") and not can_differ:
        raise UserError("the model must have equally many experts in all layers: use grouping=uniform")
    if not excluded < set(range(len(experts))):
        raise UserError(f"excluded_layers={sorted(excluded)}: allowed: some of 0..{len(experts) - 1}, not all")
    counts = {name: count for i, (name, count) in enumerate(experts.items()) if i not in excluded}
    mean = sum(counts.values()) // len(counts)
    if config.grouping == "global" and config.experts > mean:
        raise UserError(f"experts={config.experts}: the model has {mean} a layer; give at most that many")
    for name, count in counts.items():
        if config.grouping == "uniform" and config.experts > count:
            raise UserError(f"experts={config.experts}: {name} has {count}; give at most that many, or exclude it")


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


def _write(
    source: Path, weights: ModelWeights, config: SupervisedConfig, written: RunDirectory, report: Mapping[str, Any]
) -> None:
    write_first_checkpoint(weights, checkpoints_of(written.root), f"{source.name}, compressed", weights.identity)
    identity = RunDirectory(source).identity
    if identity.is_file():
        shutil.copy(identity, written.root)
    write_json(written.root / REPORT, report)
    written.describe(config.plain(), LaunchEnvironment())  # last: its presence makes it a run


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
