"""Runs of decoder language models and of BERTs as directories that transformers loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dist_moe.data.labelled_text.tokens import PADDING_TOKENS, open_tokenizer, padding_of
from dist_moe.engine.checkpoint import ModelWeights, place_weights
from dist_moe.errors import UserError
from dist_moe.models import BertConfig, BertModel, MoEModel, Transformer, TransformerConfig
from dist_moe.models.bert import write_hugging_face, write_with_experts
from dist_moe.models.bert.model import AUXILIARY
from dist_moe.models.hugging_face.decoder import saved_weights, write_decoder_weights
from dist_moe.models.hugging_face.families import family_named
from dist_moe.models.hugging_face.files import write_tokenizer
from dist_moe.models.hugging_face.mixtures import run_of
from dist_moe.parallel import SingleWorld
from dist_moe.recipes.merge_compress.compress import num_parameters
from dist_moe.recipes.merge_compress.fold import StoredDecoder, compare, fold, has_maps, some_tokens
from dist_moe.recipes.supervised.config import SupervisedConfig
from dist_moe.recipes.supervised.runs import check_same_data, find_weights
from dist_moe.recipes.supervised.size import planned_model
from dist_moe.tasks import build_model
from dist_moe.tasks.labelled_text.task import LabelledTextTask
from dist_moe.tasks.language.task import LanguageModelTask
from dist_moe.tasks.task import Task

SPECIAL_TOKENS = {
    "pad_token": PADDING_TOKENS,
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "unk_token": ("[UNK]", "<unk>"),
    "mask_token": ("[MASK]", "<mask>"),
}
"""Tokens that transformers' tokenizers of encoders want to know by name, and how they are usually written."""

_FOLDED_ON = 256
"""Sequences of the training text on which routers of merged experts are fitted, and of the test text, to compare."""

INPUTS = ("input_ids", "token_type_ids", "attention_mask")
"""Inputs of a BERT; transformers' tokenizers leave out the second unless they are told."""


@dataclass(frozen=True)
class HuggingFaceExport:
    """``architecture``: transformers' class. ``parameters``: how many the model that was written has. ``folding``: how
    much it differs where slots that share an expert were folded into its routers; see ``compare``."""

    directory: Path
    architecture: str
    parameters: int
    folding: dict[str, float] | None = None


def export_hugging_face(
    source: Path,
    directory: Path,
    dtype: torch.dtype,
    architecture: str | None = None,
    *,
    allow_changed_data: bool = False,
) -> HuggingFaceExport:
    """``dist-moe export --hf``: a run, checkpoint or exported file as a directory that transformers loads.

    The same bytes whatever layout wrote the checkpoint. ``architecture``: of a decoder; None is the plainest that fits.
    Raises UserError, also if transformers has no such model or ``architecture`` no place for all of it, and for other
    data, whose tokenizer would be another, unless ``allow_changed_data``.
    """
    weights = find_weights(source)
    config = weights.config
    _check(config, architecture)
    task = config.data.open(progress=True)
    check_same_data(source, weights, task, allowed=allow_changed_data)
    model = build_model(config, task, SingleWorld())
    weights.load(model)
    if isinstance(model, Transformer):
        return _write_decoder(saved_weights(model), task, config, directory, dtype, architecture)
    written = _write_bert(model, task, config, directory, dtype)
    kept = (p.numel() for name, p in model.named_parameters() if not name.startswith(AUXILIARY))
    return HuggingFaceExport(directory, written, sum(kept))


def export_weights_of(
    weights: ModelWeights, task: Task, config: SupervisedConfig, directory: Path, dtype: torch.dtype
) -> HuggingFaceExport:
    """Write a decoder as a directory that transformers loads, from weights that are read tensor by tensor.

    A whole model is in memory only where it was still learning a permutation, which is rounded. Raises UserError as
    :func:`export_hugging_face` does.
    """
    _check(config, None)
    if not isinstance(config.model, TransformerConfig):
        raise UserError(f"model.name={config.model.name} is no decoder; a transformer can be written")
    learned = config.model.permutation is not None
    model = build_model(config, task, SingleWorld()) if learned else planned_model(config, task)
    assert isinstance(model, Transformer)
    if learned:
        place_weights(model, weights)
    saved = saved_weights(model, None if learned else weights)
    return _write_decoder(saved, task, config, directory, dtype)


def _check(config: SupervisedConfig, architecture: str | None) -> None:
    if not isinstance(config.model, TransformerConfig | BertConfig):
        raise UserError(
            f"model.name={config.model.name} is none that transformers knows; a transformer, or a BERT, can be written"
        )
    if architecture is not None:
        family_named(architecture, "--architecture")
    if config.model.low_rank is not None:
        raise UserError("model.low_rank: transformers has no experts of low rank; export such a run without --hf")
    if architecture is not None and isinstance(config.model, BertConfig):
        raise UserError(
            f"--architecture={architecture} is a decoder's; leave it out for model.name={config.model.name}"
        )


def _write_decoder(
    weights: ModelWeights,
    task: Task,
    config: SupervisedConfig,
    directory: Path,
    dtype: torch.dtype,
    architecture: str | None = None,
) -> HuggingFaceExport:
    """Write a decoder; slot maps that a stock architecture has no place for are folded into its routers."""
    assert isinstance(task, LanguageModelTask), "the configuration's checks know what fits"
    assert isinstance(config.model, TransformerConfig)
    steps, folding = _total_steps(task, config), None
    stored = StoredDecoder(config.model, weights, run_of(task.vocab_size, {"total_steps": steps}))
    if architecture is not None and family_named(architecture).has_experts and has_maps(config.model):
        before, (fitted, held_out) = stored, (some_tokens(part, _FOLDED_ON) for part in (task.train, task.test))
        stored, exact = fold(before, fitted[0])
        folding = None if exact else compare(before, stored, *held_out)
    written = write_decoder_weights(
        stored.weights,
        stored.config,
        task.vocab_size,
        directory,
        architecture=architecture,
        dtype=dtype,
        positions=task.tokens_per_example,
        total_steps=steps,
        tokenizer=task.tokenizer,
        end_of_text=task.end_of_text,
        imports=config.imports,
    )
    parameters = num_parameters(stored.weights)
    return HuggingFaceExport(directory, family_named(written).class_name, parameters, folding)


def _write_bert(model: MoEModel, task: Task, config: SupervisedConfig, directory: Path, dtype: torch.dtype) -> str:
    data: Any = config.data
    section = config.model
    assert isinstance(task, LabelledTextTask)
    assert isinstance(model, BertModel)
    assert isinstance(section, BertConfig)
    tokenizer = open_tokenizer(data.tokenizer or task.encoder.tokenizer, data.max_length)
    tokenizer.no_truncation()  # whoever uses it says whether texts are cut
    said: dict[str, Any] = {"labels": task.classes, "dtype": dtype, "padding": padding_of(tokenizer)}
    if model.moe_layers:
        steps = _total_steps(task, config)
        written = write_with_experts(model, section, directory, **said, total_steps=steps, imports=config.imports)
    else:
        written = write_hugging_face(model, directory, **said)
    special = {use: _first_known(tokenizer, names) for use, names in SPECIAL_TOKENS.items()}
    write_tokenizer(directory, tokenizer, data.max_length, special, INPUTS)
    return written


def _first_known(tokenizer: Tokenizer, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if tokenizer.token_to_id(name) is not None), None)


def _total_steps(task: Task, config: SupervisedConfig) -> int:
    return config.train.total_steps(len(task.train) // config.train.batch_size)
