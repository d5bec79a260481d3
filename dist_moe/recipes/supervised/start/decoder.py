"""A decoder that begins with the weights of a run: the same model, or a dense one's up-cycled into experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dist_moe.data.prepared import digests_by_part
from dist_moe.data.text import Text, TextConfig, prepare_text
from dist_moe.engine.checkpoint import ROUTERS, place_weights
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError
from dist_moe.gates import GateContext
from dist_moe.models import RunShape, Transformer, TransformerConfig
from dist_moe.models.conversion import DecoderConversionConfig
from dist_moe.models.conversion.decoder import conversion_errors, convert_decoder
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.identity import check_stem
from dist_moe.recipes.supervised.runs import Weights, weights_named_by
from dist_moe.recipes.supervised.start.settings import StartSettings
from dist_moe.tasks import Task
from dist_moe.tasks.language import LanguageModelTask

_MAY_DIFFER = {"activation_checkpointing"}
_SPLIT = ("seed", "held_out", "characters_per_domain")
"""Fields of ``data`` that decide in which part a document is."""


class DecoderStart(StartSettings):
    """The weights of a run of a decoder, the same model or a dense one's up-cycled into experts."""

    models: ClassVar[tuple[str, ...]] = ("transformer",)

    name: Literal["decoder"] = Field("decoder", description="which start this is")
    run: Path = Field(
        description="finished or imported run of a decoder with the same tokens, whose weights are taken (its best "
        "checkpoint); those of a dense one become experts where the model has some"
    )
    conversion: DecoderConversionConfig = Field(
        default_factory=lambda: DecoderConversionConfig(), description="how dense feed-forward networks become experts"
    )

    def check(self, config: Any, task: Task) -> None:
        """Raise UserError for a run from which the model cannot begin on the data."""
        assert isinstance(task, LanguageModelTask), "the configuration's checks know what fits"
        check_decoder_start(self, config.model, task.data)

    def fill(self, model: Transformer, config: Any, task: Task, environment: LaunchEnvironment) -> None:
        """Give the model the weights of the run."""
        fill_from_run(model, self, task.id_counts())


def check_decoder_start(start: DecoderStart, model: TransformerConfig, data: Text) -> None:
    """Raises `UserError` for a run from which ``model`` cannot begin on ``data``, before any process group exists."""
    weights = weights_named_by("start.run", start.run)
    theirs = _decoder_of(start, weights.config)
    _check_text(start, weights, data)
    if not theirs.moe_every:
        for fault in conversion_errors(theirs, model, start.conversion):
            raise UserError(f"start.run={start.run}: {fault}")
        return
    for name in sorted(TransformerConfig.model_fields.keys() - _MAY_DIFFER):
        if getattr(theirs, name) != getattr(model, name):
            raise UserError(
                f"start.run={start.run} has experts, and model.{name}={getattr(theirs, name)!r}, not "
                f"{getattr(model, name)!r}; take the section model of its config.yaml"
            )


def fill_from_run(model: Transformer, start: DecoderStart, id_counts: Tensor | None) -> None:
    """Give a new run's ``model`` its first weights; where dense networks become experts, gates keep theirs.

    ``id_counts``: of the data, for gates that route by them. Raises `UserError` for weights that do not fit.
    """
    weights = weights_named_by("start.run", start.run)
    theirs = _decoder_of(start, weights.config)
    with torch.random.fork_rng(devices=[]):  # what a run draws does not depend on what it starts from
        run = RunShape(SingleWorld(), 1, GateContext(id_counts, 1))
        source = theirs.build(model.embedding.num_embeddings, run)
    weights.load(source)
    parameters = dict(source.named_parameters())
    if theirs.moe_every:
        kept = source.state_dict()
        place_weights(model, parameters | {n: t for n, t in source.named_buffers() if n in kept})
    else:
        place_weights(model, convert_decoder(parameters, theirs, model.config, start.conversion), ROUTERS)


def _decoder_of(start: DecoderStart, trained: Any) -> TransformerConfig:
    if not isinstance(trained.model, TransformerConfig):
        raise UserError(
            f"start.run={start.run} is a run of model.name={trained.model.name}; name one of model.name=transformer"
        )
    return trained.model


def _check_text(start: DecoderStart, weights: Weights, data: Text) -> None:
    """Check for the same tokens, and the same split of common text: else test documents may have been trained on."""
    trained = weights.config
    assert isinstance(trained.data, TextConfig), "the configuration's checks know what fits"
    theirs = prepare_text(trained.data, progress=False)
    # Of text that has changed since, a vocabulary would be learnt that the run never had.
    check_stem("start.run", start.run, weights.identity, digests_by_part(theirs.manifest["files"]), ("tokenizer",))
    same = (theirs.end_of_text, theirs.vocab_size) == (data.end_of_text, data.vocab_size)
    if not same or theirs.tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise UserError(
            f"start.run={start.run} was trained with other tokens than the data has; use its data.tokenizer, or its "
            f"data and data.vocab_size"
        )
    for name in _SPLIT if _share_text(theirs, data) else ():
        if theirs.manifest[name] != data.manifest[name]:
            raise UserError(
                f"start.run={start.run} was trained with data.{name}={theirs.manifest[name]} on some of this text, not "
                f"{data.manifest[name]}; give the same, or name a run of the same split"
            )


def _share_text(one: Text, other: Text) -> bool:
    """Whether a domain of both was read from the same files."""
    domains, others = one.manifest["domains"], other.manifest["domains"]
    return any(domains[name]["source"] == others[name]["source"] for name in domains.keys() & others.keys())
