"""Decoder language models as Hugging Face keeps them, there and back.

    checkpoint = read_decoder(directory)                     # a directory of one of families.py
    model = checkpoint.config.build(checkpoint.vocab_size, run)
    checkpoint.into(model)
    write_decoder(model, other)                              # the plainest architecture that has a place for all of it
    write_decoder(model, other, like=checkpoint)             # as it was read, to the bit

Every tensor is accounted for by name, and anything else is refused. Needs no transformers. ``open_decoder`` reads no
tensor before it is asked for: a model that is larger than memory can pass through.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dist_moe.engine.checkpoint import ModelWeights, place_weights
from dist_moe.engine.checkpoint.format import BUFFER
from dist_moe.engine.checkpoint.models import weights_of
from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec
from dist_moe.errors import UserError
from dist_moe.models.hugging_face.decoder_config import read_decoder_config, write_decoder_config
from dist_moe.models.hugging_face.decoder_names import (
    HEAD,
    TIED_TO,
    block_of,
    dense_names,
    stock_names,
    tensor_shapes,
    to_ours,
    to_theirs,
)
from dist_moe.models.hugging_face.families import FAMILIES, OURS, Family, plainest_architecture
from dist_moe.models.hugging_face.files import (
    CONFIG,
    DECODER,
    WEIGHTS,
    WEIGHTS_ARE,
    StoredTensors,
    check_names,
    check_specs,
    dtype_fields,
    is_constant,
    open_tensors,
    read_config,
    write_directory,
    write_tokenizer,
)
from dist_moe.models.transformer import Transformer, TransformerConfig

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class DecoderCheckpoint:
    """A decoder's directory. ``weights``: by our names. ``content``: of config.json. ``has_tied_head``: whether a tied
    matrix is in the file twice."""

    directory: Path
    architecture: str
    config: TransformerConfig
    vocab_size: int
    weights: Mapping[str, Tensor]
    content: dict[str, Any]
    has_tied_head: bool

    def into(self, model: Transformer) -> None:
        """Fill a model of ``config``, which may hold any part of the experts. Raises UserError for another model."""
        if self.architecture == OURS:
            wanted = model.state_dict().keys() - ({"head.weight"} if self.config.tied_embeddings else set())
            check_names(self.directory, set(self.weights), set(wanted), "the model")
            self._check_mixtures(model)
        place_weights(model, self.weights)

    def _check_mixtures(self, model: Transformer) -> None:
        """Raise UserError for tensors of MoE layers of another kind than the model's, not finite, or naming experts or
        slots that there are not."""
        state = model.state_dict()
        for name, tensor in self.weights.items():
            limit = self.config.num_experts if "slot_map" in name else self.config.slots_per_gate
            fault = None
            kinds = {tensor.dtype, state[name].dtype}
            if not (kinds <= set(WEIGHTS_ARE) or len(kinds) == 1):
                fault = f"is of {tensor.dtype}, the model's of {state[name].dtype}"
            elif tensor.dtype.is_floating_point and not tensor.isfinite().all():
                fault = "holds values that are not finite"
            elif name.endswith(".table") and tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < limit:
                fault = f"holds numbers outside of 0..{limit - 1}"
            if fault is not None:
                raise UserError(f"{self.directory / WEIGHTS}: {name} {fault}. Remedy: export the run again")


def open_decoder(directory: Path) -> DecoderCheckpoint:
    """Return a checkpoint directory of a known architecture, whose ``weights`` are ModelWeights, read one by one.

    Raises UserError for a directory that is none, naming fields that cannot be followed, and every tensor that is
    missing or unknown or has another shape; for values that are not finite, when they are read.
    """
    content = read_config(directory)
    try:
        config, vocab_size = read_decoder_config(content)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error
    architecture: str = content["model_type"]
    family, tensors = FAMILIES[architecture], open_tensors(directory)
    tensors = tensors.without(filter(is_constant, tensors))
    _check_counts(directory, config, family, tensors)
    has_tied_head = config.tied_embeddings and HEAD in tensors
    if has_tied_head:
        if not _same(tensors[HEAD], tensors.get(TIED_TO)):
            raise UserError(f"{directory / WEIGHTS}: tie_word_embeddings=true, and {HEAD} is not {TIED_TO}")
        tensors = tensors.without([HEAD])
    wanted = set(dense_names(config, family).values())
    for layer in filter(config.has_experts, range(config.layers)):
        prefix = f"{block_of(family, layer)}."
        if family.has_experts:
            wanted |= {prefix + name for name in stock_names(family, config.num_experts)}
        else:
            wanted |= {name for name in tensors if name.startswith(prefix)}
    check_names(directory, set(tensors), wanted, family.class_name)
    check_specs(directory, tensors.specs, tensor_shapes(config, vocab_size, family))
    weights = replace(to_ours(config, family, tensors), path=directory / WEIGHTS)
    return DecoderCheckpoint(directory, architecture, config, vocab_size, weights, content, has_tied_head)


def read_decoder(directory: Path) -> DecoderCheckpoint:
    """Return what :func:`open_decoder` does, with all weights in memory; of a stock architecture the parameters only.

    Raises UserError as that does, and for values that are not finite.
    """
    checkpoint = open_decoder(directory)
    stored = checkpoint.weights
    assert isinstance(stored, ModelWeights)
    is_stock = checkpoint.architecture != OURS
    weights = {name: stored[name] for name in stored if not (is_stock and stored.kinds[name] == BUFFER)}
    return replace(checkpoint, weights=weights)


def write_decoder(model: Transformer, directory: Path, **options: Any) -> str:
    """Write a whole model as a directory that transformers loads; return the architecture.

    ``options``: see :func:`write_decoder_weights`. Raises UserError as that does, and ValueError as
    :func:`saved_weights` does.
    """
    return write_decoder_weights(
        saved_weights(model), model.config, model.embedding.num_embeddings, directory, **options
    )


def saved_weights(model: Transformer, stored: ModelWeights | None = None) -> ModelWeights:
    """Return the weights of a whole model in memory, as views, with the buffers that are saved.

    A table that is still being learnt is rounded as it stands. ``stored``: weights to be read one by one instead, of a
    model that may be without storage and learns no table. Raises ValueError for a model without all experts.
    """
    if stored is None:
        model.begin_evaluation()
    weights, state = stored or weights_of(model), model.state_dict()
    kinds = {name: kind for name, kind in weights.kinds.items() if name in state}
    return replace(weights, kinds=kinds, specs={name: weights.specs[name] for name in kinds})


def write_decoder_weights(
    weights: ModelWeights,
    config: TransformerConfig,
    vocab_size: int,
    directory: Path,
    *,
    architecture: str | None = None,
    like: DecoderCheckpoint | None = None,
    dtype: torch.dtype | None = None,
    positions: int = 2048,
    total_steps: int | None = None,
    tokenizer: Tokenizer | None = None,
    end_of_text: int | None = None,
    imports: Sequence[str] = (),
) -> str:
    """Write the weights of a model of ``config`` as a directory that transformers loads; return the architecture.

    No more than one expert's tensor, or one of another kind, is in memory at a time. ``architecture``: None is the
    plainest one that fits. ``like``: the checkpoint whose config.json and precision are used where they fit the model.
    ``dtype``: of floating-point parameters; None: as they are. ``positions``: tokens that a sequence should have at
    most. ``total_steps``: of the training run, for gates with a schedule. ``tokenizer``: written along;
    ``end_of_text``: the id that begins and ends a text. ``imports``: modules that register gates of one's own.
    Raises UserError naming what the architecture has no place for, or if the directory cannot be written.
    """
    architecture = architecture or (like.architecture if like else plainest_architecture(config))
    options: dict[str, Any] = {"positions": positions, "total_steps": total_steps, "end_of_text": end_of_text}
    content = write_decoder_config(config, vocab_size, architecture, **options)
    if like is not None and like.architecture == architecture:
        same = write_decoder_config(like.config, like.vocab_size, architecture, **options) == content
        others = FAMILIES[architecture].num_experts[1:]
        content = like.content if same else {k: v for k, v in like.content.items() if k not in others} | content
    else:
        content |= dtype_fields(dtype or weights.specs["embedding.weight"].dtype)
    if like is not None and end_of_text is None:
        content |= {name: like.content[name] for name in _TOKEN_IDS if name in like.content}
    if architecture == OURS:
        content |= DECODER.fields(imports)
    given: Mapping[str, Tensor | TensorSpec] = {} if like is None else like.weights
    given = given.specs if isinstance(given, ModelWeights) else given  # what is not in memory shall not be read for it

    def dtype_of(name: str) -> torch.dtype:
        return dtype or given.get(name, weights.specs[name]).dtype

    tensors = to_theirs(config, FAMILIES[architecture], weights, dtype_of)
    if like is not None and like.has_tied_head:
        tensors[HEAD] = tensors[TIED_TO]
    write_directory(directory, content, tensors)
    if architecture == OURS:
        DECODER.write(directory)
    if tokenizer is not None:
        end = None if end_of_text is None else tokenizer.id_to_token(end_of_text)
        write_tokenizer(directory, tokenizer, positions, dict.fromkeys(("bos_token", "eos_token"), end))
    return architecture


def _check_counts(directory: Path, config: TransformerConfig, family: Family, tensors: StoredTensors) -> None:
    """Raise UserError for more layers or experts than there can be: nothing of that size shall be built."""
    if config.layers > len(tensors):
        raise UserError(f"{directory / CONFIG} says {config.layers:,} layers, and there are {len(tensors)} tensors")
    if family.has_experts and config.num_experts > len(tensors):
        raise UserError(
            f"{directory / CONFIG} says {config.num_experts:,} experts, and there are {len(tensors)} tensors"
        )
    for layer in filter(config.has_experts, range(0 if family.has_experts else config.layers)):
        count, prefix = config.experts_of(layer), f"{block_of(family, layer)}.experts."
        stacks = {name: spec.shape[:1] for name, spec in tensors.specs.items() if name.startswith(prefix)}
        for name in (name for name, rows in stacks.items() if rows != (count,)):
            raise UserError(f"{directory / CONFIG} says {count:,} experts, and {name} has another number")


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)
