"""Hugging Face directories of decoder language models as the start of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_moe.config.overrides import parse_overrides
from dist_moe.config.plain_yaml import Content, read_yaml
from dist_moe.data.tokenizer_files import read_tokenizer
from dist_moe.engine.checkpoint import ROUTERS, place_weights, write_first_checkpoint
from dist_moe.engine.checkpoint.files import checkpoints_of
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.run_lock import held
from dist_moe.errors import UserError
from dist_moe.models import Transformer, TransformerConfig
from dist_moe.models.conversion.decoder import (
    OF_MIXTURES,
    DecoderConversionConfig,
    convert_decoder,
    width_of_experts,
)
from dist_moe.models.hugging_face.decoder import DecoderCheckpoint, read_decoder
from dist_moe.models.hugging_face.families import family_named
from dist_moe.models.hugging_face.files import TOKENIZER
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.identity import Identity
from dist_moe.recipes.recipe import set_fields, validate_config
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.tasks import build_model
from dist_moe.tasks.language.task import LanguageModelTask

_SIZES = TransformerConfig.model_fields.keys() - OF_MIXTURES - {"name"}


def import_hugging_face(
    source: Path,
    run_dir: Path,
    config_path: Path,
    conversion: DecoderConversionConfig,
    overrides: Sequence[str] = (),
) -> tuple[Path, SupervisedConfig]:
    """``dist-moe import DIR RUN_DIR --config CONFIG``: step 0 of a run that has yet to train. Its checkpoint.

    The sizes of the model are those of the checkpoint, whatever CONFIG says. A dense checkpoint is up-cycled where
    ``model.moe_every`` is not 0, by ``conversion``; one with experts stays the model that it is. Raises UserError.
    """
    run = RunDirectory(run_dir)
    with held(run_dir, LaunchEnvironment(), option="RUN_DIR"):
        run.check_unused("RUN_DIR")
        assignments = parse_overrides(overrides)
        content = read_yaml(config_path)
        set_fields(content, overrides)
        validate_config(content)  # and its modules are imported: a gate in the directory may be one of theirs
        checkpoint = read_decoder(source)
        config = validate_config(_fitted(content, assignments, checkpoint, conversion))
        assert isinstance(config.model, TransformerConfig)
        config.check(config.parallel.expert_parallel_size)  # the least number of ranks
        task = config.data.open(progress=True)
        assert isinstance(task, LanguageModelTask), "the configuration's checks know what fits"
        check_tokens(source, checkpoint, task)
        if checkpoint.config.moe_every:  # without storage first: sizes that no tensor has would take memory
            with torch.device("meta"):
                checkpoint.into(_model(config, task))
        model = _model(config, task)
        _fill(model, checkpoint, conversion)
        imported_from = f"{source.name} ({family_named(checkpoint.architecture).class_name})"
        identity = Identity(data=task.digests())
        written = write_first_checkpoint(model, checkpoints_of(run_dir), imported_from, identity.plain())
        identity.write(run)
        run.describe(config.plain(), LaunchEnvironment())  # last: its presence makes it a run
    return written, config


def _model(config: SupervisedConfig, task: LanguageModelTask) -> Transformer:
    model = build_model(config, task, SingleWorld())
    assert isinstance(model, Transformer)
    return model


def _fitted(
    content: Content,
    assignments: Mapping[str, Any],
    checkpoint: DecoderCheckpoint,
    conversion: DecoderConversionConfig,
) -> Content:
    """``content`` with the checkpoint's sizes in its section ``model``."""
    fixed = TransformerConfig.model_fields.keys() if checkpoint.config.moe_every else _SIZES
    for key, value in assignments.items():
        if key.startswith("model.") and key.split(".")[1] in fixed:
            raise UserError(f"{key}={value} cannot be chosen: it is the checkpoint's")
    section = checkpoint.config.model_dump(mode="json")
    if checkpoint.config.moe_every:
        return content | {"model": section}
    given = dict(content.get("model") or {}) | {name: section[name] for name in ("name", *_SIZES)}
    experts = given.get("num_experts", TransformerConfig.model_fields["num_experts"].default)
    is_given = any(key.startswith("model.experts") for key in assignments)
    if not is_given and isinstance(experts, int) and experts > 0:
        given["experts"] = {"hidden": width_of_experts(checkpoint.config, experts, conversion)}
    return content | {"model": given}


def check_tokens(source: Path, checkpoint: DecoderCheckpoint, task: LanguageModelTask) -> None:
    """Raise UserError unless the data have the tokens of a checkpoint: as many, and its tokenizer where it has one."""
    size, path = task.vocab_size, source / TOKENIZER
    tokens = _tokens_of(path) if path.is_file() else None
    if tokens is not None and max(tokens.values()) >= checkpoint.vocab_size:
        raise UserError(
            f"{path} has tokens up to id {max(tokens.values())}, the embedding beside it {checkpoint.vocab_size} rows; "
            f"take the tokens without rows out of it"
        )
    if size != checkpoint.vocab_size:
        raise UserError(
            f"{source} has a vocabulary of {checkpoint.vocab_size} tokens, the data one of {size}; use data.tokenizer="
            f"{source}, or the data and data.vocab_size with which the checkpoint was trained"
        )
    if tokens is not None and tokens != task.tokenizer.get_vocab():
        raise UserError(
            f"{path} is not the tokenizer of the data; use data.tokenizer={source}, or the data of the checkpoint"
        )


def _tokens_of(path: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = read_tokenizer(path, str(path))[0].get_vocab()
    return vocabulary


def _fill(model: Transformer, checkpoint: DecoderCheckpoint, conversion: DecoderConversionConfig) -> None:
    if checkpoint.config.moe_every:
        checkpoint.into(model)
        return
    weights = convert_decoder(checkpoint.weights, checkpoint.config, model.config, conversion)
    place_weights(model, weights, ROUTERS)
