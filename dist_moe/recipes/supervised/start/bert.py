"""BERTs that begin with the weights of an encoder or of a dense run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_moe.data.batches import shard_batches
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.errors import UserError
from dist_moe.models import BertConfig, BertModel
from dist_moe.models.bert import read_hugging_face
from dist_moe.models.conversion import BertConversionConfig, convert_bert, neuron_importance, place_converted
from dist_moe.parallel import SingleWorld, sum_over_ranks
from dist_moe.recipes.identity import check_stem
from dist_moe.recipes.supervised.runs import Weights, rehearsed_model, trained_model, weights_named_by
from dist_moe.recipes.supervised.start.settings import StartSettings
from dist_moe.tasks import Task
from dist_moe.tasks.labelled_text import LabelledTextTask
from dist_moe.tasks.labelled_text.encoder import Encoder
from dist_moe.tasks.task import run_shape


class BertStart(StartSettings):
    """The weights of an encoder or of a dense run, which become experts where the model has some."""

    models: ClassVar[tuple[str, ...]] = ("bert_classifier", "bert_answerer")
    is_default: ClassVar[bool] = True

    name: Literal["bert"] = Field("bert", description="which start this is")
    run: Path | None = Field(
        None,
        description="finished run of a dense model whose weights are taken instead of the encoder's (its best "
        "checkpoint), and become experts where the model has some",
    )
    conversion: BertConversionConfig = Field(
        default_factory=lambda: BertConversionConfig(), description="how dense feed-forward networks become experts"
    )
    importance_examples: int = Field(
        1024, ge=1, description="training examples by which the importance of neurons is measured"
    )

    def check(self, config: Any, task: Task) -> None:
        """Raise UserError for a start from which the model cannot begin, by a rehearsal without storage."""
        assert isinstance(task, LabelledTextTask), "the configuration's checks know what fits"
        check_start(self, config.model, config.data, task.digests())
        with torch.device("meta"):
            model = task.build_model(config.model, run_shape(config, task, SingleWorld()))
        rehearse_start(model, config.model, self, task.encoder, lambda run: rehearsed_model(run, task))

    def digest(self, task: Task) -> str | None:
        """Return a digest of the weights of the run, or else of the encoder."""
        assert isinstance(task, LabelledTextTask), "the configuration's checks know what fits"
        return task.encoder.weights if self.run is None else super().digest(task)

    def fill(self, model: BertModel, config: Any, task: Task, environment: LaunchEnvironment) -> None:
        """Give the model the weights of the encoder or of the run, converted where there are experts."""
        assert isinstance(task, LabelledTextTask), "the configuration's checks know what fits"
        fill_from_start(
            model,
            config.model,
            self,
            task.encoder,
            open_run=lambda run: trained_model(run, task, SingleWorld()),
            importance=lambda dense: self._importance(dense, task, environment),
        )

    def _importance(self, model: BertModel, task: LabelledTextTask, environment: LaunchEnvironment) -> Tensor:
        """Return (layers, H), in fp64, so that the order of neurons does not depend on how ranks share the examples."""
        examples = np.arange(min(self.importance_examples, len(task.train)))
        shares = shard_batches(examples, task.eval_batch, rank=environment.rank, world_size=environment.world_size)
        batches = (task.train.batch(index_B, examples).to(environment.device) for index_B in shares)
        importance_LH = neuron_importance(
            model.double().to(environment.device),
            batches,
            inputs=lambda batch: batch.inputs,
            losses=lambda output, batch: task.losses(output.predictions, batch.label_B),
        )
        return sum_over_ranks(importance_LH).cpu()


def check_start(start: BertStart, model: BertConfig, data: Any, digests: Mapping[str, str]) -> None:
    """Raises `UserError` for a start from which ``model`` cannot begin on ``data``, without a look at weights.

    ``digests``: of the task.
    """
    if start.run is not None:
        weights = weights_named_by("start.run", start.run)
        if weights.config.model.num_moe_layers:
            raise UserError(f"start.run={start.run}: its model has experts; name a run with model.moe_every=0")
        if getattr(weights.config.data, "name", None) == data.name:
            check_same_split("start.run", start.run, weights, data, digests)
        check_stem("start.run", start.run, weights.identity, digests, ("tokenizer",))
    elif _needs_importance(start, model):
        without = "start.conversion.order=random"
        if model.hidden is None:
            without += " or start.conversion.method=copies"
        raise UserError(
            f"start.run is not given, and start.conversion.order={start.conversion.order} needs it: what matters is "
            f"known only of a dense model that was trained on the task. Remedy: train one with model.moe_every=0 and "
            f"name its run, or set {without}"
        )


def check_same_split(field: str, run: Path, weights: Weights, ours: Any, digests: Mapping[str, str]) -> None:
    """Raise UserError where texts to validate and test on here may be among those that ``run`` learnt from.

    ``weights``: its own; ``ours``, ``digests``: the section of the data here, and those of the task.
    """
    for name in ("name", "graded", "seed"):
        there, here = getattr(weights.config.data, name, None), getattr(ours, name, None)
        if there != here:
            raise UserError(
                f"{field}={run} was trained with data.{name}={there}, not {here}; name a run of the same task and split"
            )
    check_stem(field, run, weights.identity, digests, ("split",))


def rehearse_start(
    model: BertModel,
    settings: BertConfig,
    start: BertStart,
    encoder: Encoder,
    open_run: Callable[[Path], BertModel],
) -> None:
    """:func:`fill_from_start` on a ``model`` without storage: raises its `UserError` while there is nothing to lose.

    Which neurons are taken decides no shape, so none are measured.
    """
    conversion = start.conversion.model_copy(update={"order": "random", "noise": 0.0})
    plain = start.model_copy(update={"conversion": conversion})
    try:
        fill_from_start(model, settings, plain, encoder, open_run, importance=_unmeasured)
    except UserError as error:
        raise UserError(f"start: {error}") from error


def _unmeasured(model: BertModel) -> Tensor:
    raise AssertionError("a random order needs no importance")


def fill_from_start(
    model: BertModel,
    settings: BertConfig,
    start: BertStart,
    encoder: Encoder,
    open_run: Callable[[Path], BertModel],
    importance: Callable[[BertModel], Tensor],
) -> None:
    """Give a new run's ``model`` its first weights; gates, and a head that there is not, keep theirs.

    ``open_run``: the model of a finished run; ``importance``: (layers, H) of its neurons, the same on all
    ranks. Raises `UserError` for weights that do not fit.
    """
    if start.run is None:
        checkpoint = read_hugging_face(encoder.directory)
        dense, shape, importance_LH = checkpoint.weights, checkpoint.shape, None
    else:
        trained = open_run(start.run)
        dense, shape = dict(trained.named_parameters()), trained.shape
        importance_LH = importance(trained) if _needs_importance(start, settings) else None
    place_converted(model, convert_bert(dense, shape, settings, start.conversion, importance_LH))


def _needs_importance(start: BertStart, model: BertConfig) -> bool:
    if start.conversion.order == "random":
        return False
    return model.hidden is not None or (model.moe_every > 0 and start.conversion.method == "partition")
