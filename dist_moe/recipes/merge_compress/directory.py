"""``dist-moe compress DIR``: a Hugging Face directory of a mixture with fewer experts, one layer in memory at a time.

The text goes through the model layer by layer, so that calibration takes the memory of a layer and of the text's hidden
states; experts are read, merged and written one by one. Groups and means are those of runs: see compress.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dist_moe.config.files import write_json
from dist_moe.config.overrides import assign, parse_overrides
from dist_moe.config.plain_yaml import Content, read_yaml
from dist_moe.config.validation import validate
from dist_moe.engine.checkpoint import ModelWeights, write_first_checkpoint
from dist_moe.engine.checkpoint.files import checkpoints_of
from dist_moe.engine.health.heartbeats import ACTIVITY
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.run_lock import held
from dist_moe.errors import UserError
from dist_moe.models.hugging_face.decoder import DecoderCheckpoint, open_decoder, write_decoder_weights
from dist_moe.models.hugging_face.families import OURS, family_named
from dist_moe.models.hugging_face.files import CONTEXT, IMPORTS, WEIGHTS
from dist_moe.models.hugging_face.mixtures import run_of
from dist_moe.models.layer_stream import Flow, each_layer
from dist_moe.models.transformer import DecoderLayer
from dist_moe.recipes.hugging_face.import_ import check_tokens
from dist_moe.recipes.identity import Identity
from dist_moe.recipes.merge_compress.calibrate import LayerStatistics, LayerSums
from dist_moe.recipes.merge_compress.compress import (
    REPORT,
    check_counts,
    check_layer,
    mixture_fields,
    plan_merge,
    slot_buffers,
    supervised_config,
    what_became,
)
from dist_moe.recipes.merge_compress.fold import StoredDecoder, compare, fold, some_tokens
from dist_moe.recipes.merge_compress.merge import MergedLayer, merged_weights
from dist_moe.recipes.merge_compress.picture import PICTURE, write_picture
from dist_moe.recipes.merge_compress.settings import CompressConfig
from dist_moe.recipes.recipe import set_fields, validate_config
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recording import recording
from dist_moe.search import SlotTable
from dist_moe.tasks.language import LanguageModelSettings, LanguageModelTask

Form = Literal["run", "dist_moe", "stock"]

TEXT = "brown"
"""The corpus on which experts are compared if nothing else is said: the smallest one."""

_TOKENS_AT_ONCE = 256
"""Tokens that are compared at once: what all experts make of more would take more memory than a layer."""

_BESIDE_WEIGHTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
"""Files of a directory that have nothing to do with its experts."""


@dataclass(frozen=True)
class Compression:
    """A directory to be compressed. ``form``: what is written: a run of ours, a directory of our own architecture or of
    DIR's (None: the latter after pruning, else ours). ``config``: a configuration file of a run, for its data and, for
    form=run, all else but the model. ``overrides``: of its fields."""

    source: Path
    output: Path
    form: Form | None = None
    config: Path | None = None
    overrides: Sequence[str] = ()


def compress_directory(job: Compression, config: CompressConfig) -> dict[str, Any]:
    """Write a model with fewer experts than that in a Hugging Face directory; return the report.

    Raises UserError for a directory that cannot be read or has no experts, if its experts cannot be merged as
    ``config`` says, if the output exists already, and for text of other tokens.
    """
    environment = LaunchEnvironment.read()
    checkpoint = open_decoder(job.source)
    form = job.form or ("stock" if config.by.prunes and checkpoint.architecture != OURS else "dist_moe")
    _check(job, form, checkpoint, environment)
    if config.aligns_by_activations:
        raise UserError("align_by=activations: a directory is never whole in memory; use align_by=weights")
    config = config.settled(can_differ=form != "stock")
    before = _stored(checkpoint)
    counts = {name: _experts(before.weights, name) for name in before.moe_layers}
    check_counts(counts, config, "a stock architecture", can_differ=form != "stock")
    settings = _run_config(job, checkpoint) if form == "run" else None
    data = settings.data if settings else _data(job)
    assert isinstance(data, LanguageModelSettings)
    task = data.open(progress=True)
    check_tokens(job.source, checkpoint, task)
    lock = held(job.output, environment, option="OUT") if form == "run" else nullcontext()
    with lock, recording(None):
        token_NS, _ = some_tokens(getattr(task, config.part), config.examples)
        plan = _plan(before, config, token_NS)
        after = _merged(before, plan, prunes=config.by.prunes)
        report: dict[str, Any] = {
            "source": str(job.source),
            "form": form,
            "compress": config.model_dump(mode="json") | {"examples": len(token_NS)},
            **what_became(before.weights, after.weights, plan.layers, plan.statistics, prunes=config.by.prunes),
        }
        held_out = some_tokens(task.test, config.examples)
        if form == "stock":
            merged = after
            after, exact = fold(merged, token_NS)
            report["folding"] = None if exact else compare(merged, after, *held_out)
        report["held_out"] = {"tokens": held_out[0].numel(), **compare(before, after, *held_out)}
        if settings is None:
            _write_directory(job, form, checkpoint, after)
        else:
            _write_run(job, settings, checkpoint, after, task)
        write_json(job.output / REPORT, report)
        write_picture(report, job.output / PICTURE)
    return report


@dataclass(frozen=True)
class _Plan:
    """The new experts of each layer, the statistics that say so, and new slot maps and masks: ``buffers``."""

    layers: Mapping[str, MergedLayer]
    statistics: Mapping[str, LayerStatistics]
    buffers: Mapping[str, Tensor]


def _plan(model: StoredDecoder, config: CompressConfig, token_NS: Tensor) -> _Plan:
    """Send the text through the layers, then group the experts of all."""
    statistics: dict[str, LayerStatistics] = {}
    hidden_axes: dict[str, Mapping[str, int]] = {}
    routers: dict[str, tuple[SlotTable, torch.nn.ModuleList]] = {}
    flow = Flow.begin(model.config, model.weights, token_NS)

    def visit(index: int, layer: DecoderLayer) -> None:
        if layer.moe is not None:
            name = f"layers.{index}.moe"
            check_layer(name, layer.moe, config, f"gate.name={model.config.gate.name}")
            sums = LayerSums(layer.moe, outputs=config.needs_outputs)
            layer.moe.register_forward_hook(sums.see)
            assert isinstance(layer.moe.slot_map, SlotTable)
            hidden_axes[name] = layer.moe.experts.hidden_axes
            routers[name] = layer.moe.slot_map, layer.moe.gates
        flow.advance(layer, _TOKENS_AT_ONCE)
        if layer.moe is not None:
            statistics[name] = sums.statistics()
        ACTIVITY.beat()

    each_layer(model.config, model.weights, model.run, visit)
    layers = plan_merge(hidden_axes, statistics, model.weights, config, {})
    buffers: dict[str, Tensor] = {}
    for name, (slot_map, gates) in routers.items():
        buffers |= slot_buffers(name, layers[name], slot_map, gates, prunes=config.by.prunes)
    kept = {name: buffer for name, buffer in buffers.items() if name in model.weights or "allowed_E" in name}
    return _Plan(layers, statistics, kept)


def _merged(model: StoredDecoder, plan: _Plan, *, prunes: bool) -> StoredDecoder:
    """Return the model with slot maps, whose experts are merged as they are read."""
    counts = [len(layer.leaders) for layer in plan.layers.values()]
    fields = mixture_fields(model.config, counts, prunes=prunes)
    section = validate(type(model.config), model.config.model_dump(mode="json") | fields)
    return StoredDecoder(section, merged_weights(model.weights, plan.layers, plan.buffers), model.run)


def _stored(checkpoint: DecoderCheckpoint) -> StoredDecoder:
    assert isinstance(checkpoint.weights, ModelWeights)
    return StoredDecoder(
        checkpoint.config, checkpoint.weights, run_of(checkpoint.vocab_size, checkpoint.content.get(CONTEXT))
    )


def _experts(weights: ModelWeights, layer: str) -> int:
    return next(weights.specs[name].shape[0] for name in weights if name.startswith(f"{layer}.experts."))


def _check(job: Compression, form: Form, checkpoint: DecoderCheckpoint, environment: LaunchEnvironment) -> None:
    """Raise UserError for what cannot be done, before any text is looked at."""
    model = checkpoint.config
    if environment.world_size > 1:
        raise UserError("a Hugging Face directory is compressed by one process; start it without torchrun")
    if not model.moe_every:
        raise UserError(f"{job.source} has no experts: there is nothing to merge or to prune")
    if model.low_rank is not None:
        raise UserError(f"{job.source}: experts that are factored cannot be merged any more; merge them before")
    if form == "run" and job.config is None:
        raise UserError("--as run needs --config CONFIG for the rest of the run")
    if form == "stock" and checkpoint.architecture == OURS:
        raise UserError(f"{job.source} is of our own architecture: there is no stock one to write; use --as dist_moe")
    if form == "run" and checkpoint.architecture == OURS:
        raise UserError(
            f"{job.source} is of our own architecture: 'dist-moe import' it, and compress that run instead of --as run"
        )
    if form != "run" and any((job.output / name).exists() for name in (WEIGHTS, REPORT)):
        raise UserError(f"OUT {job.output} holds a model already; name another directory")
    if form == "run":
        RunDirectory(job.output).check_unused("OUT")


def _content(job: Compression) -> Content:
    """Return the configuration file, if any, with the overrides; the tokenizer is that of the directory."""
    content = read_yaml(job.config) if job.config is not None else {}
    data = content.get("data")
    if not isinstance(data, dict):
        roots = [key for key in parse_overrides(job.overrides) if key == "data.root"]
        content["data"] = data = {"name": "text" if roots else TEXT}
    data.setdefault("tokenizer", str(job.source))
    return content


def _data(job: Compression) -> LanguageModelSettings:
    content = _content(job)
    for key, value in parse_overrides(job.overrides).items():
        if not key.startswith("data."):
            raise UserError(f"{key}: only data.FIELD=VALUE and options of compress go with --as {job.form}")
        assign(content, key, value)
    return validate(LanguageModelSettings, content["data"])


def _run_config(job: Compression, checkpoint: DecoderCheckpoint) -> SupervisedConfig:
    """Return the configuration of the run to be, as yet with the model of the directory."""
    content = _content(job)
    for key in parse_overrides(job.overrides):
        if key.startswith("model."):
            raise UserError(f"{key} cannot be chosen: it is the checkpoint's")
    set_fields(content, job.overrides)
    config: SupervisedConfig = validate_config(content | {"model": checkpoint.config.model_dump(mode="json")})
    return config


def _write_directory(job: Compression, form: Form, checkpoint: DecoderCheckpoint, model: StoredDecoder) -> None:
    architecture = checkpoint.architecture if form == "stock" else OURS
    write_decoder_weights(
        model.weights,
        model.config,
        checkpoint.vocab_size,
        job.output,
        architecture=architecture,
        like=checkpoint,
        positions=checkpoint.content.get("max_position_embeddings", 2048),
        total_steps=(checkpoint.content.get(CONTEXT) or {}).get("total_steps"),
        imports=checkpoint.content.get(IMPORTS) or (),
    )
    for name in filter(lambda name: (job.source / name).is_file(), _BESIDE_WEIGHTS):
        shutil.copyfile(job.source / name, job.output / name)


def _write_run(
    job: Compression,
    settings: SupervisedConfig,
    checkpoint: DecoderCheckpoint,
    model: StoredDecoder,
    task: LanguageModelTask,
) -> None:
    config = supervised_config(settings, model.config.model_dump(mode="json"))
    config.check(config.parallel.expert_parallel_size)
    run, identity = RunDirectory(job.output), Identity(data=task.digests())
    name = f"{job.source.name} ({family_named(checkpoint.architecture).class_name}), compressed"
    write_first_checkpoint(model.weights, checkpoints_of(job.output), name, identity.plain())
    identity.write(run)
    run.describe(config.plain(), LaunchEnvironment())  # last: its presence makes it a run
