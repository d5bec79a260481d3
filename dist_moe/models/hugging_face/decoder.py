"""Decoder language models as Hugging Face keeps them, there and back.

    checkpoint = read_decoder(directory)                     # Llama's family, Mixtral, OLMoE, or what we wrote
    model = checkpoint.config.build(checkpoint.vocab_size, run)
    checkpoint.into(model)
    write_decoder(model, other)                              # the plainest architecture that has a place for all of it
    write_decoder(model, other, like=checkpoint)             # as it was read, to the bit

Every tensor is accounted for by name, and anything else is refused. Needs no transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dist_moe.engine.checkpoint import place_weights
from dist_moe.errors import UserError
from dist_moe.models.hugging_face.decoder_config import (
    CLASSES,
    Architecture,
    architecture_of,
    plainest_architecture,
    read_decoder_config,
    write_decoder_config,
)
from dist_moe.models.hugging_face.decoder_names import (
    HEAD,
    TIED_TO,
    dense_names,
    is_of_mixture,
    stock_names,
    to_ours,
    to_theirs,
)
from dist_moe.models.hugging_face.files import (
    WEIGHTS,
    check_names,
    dtype_fields,
    read_config,
    read_tensors,
    tensors_of,
    write_directory,
)
from dist_moe.models.hugging_face.remote_code import DECODER
from dist_moe.models.hugging_face.tokenizer_files import write_tokenizer
from dist_moe.models.transformer import Transformer, TransformerConfig


@dataclass(frozen=True)
class DecoderCheckpoint:
    """``weights``: by our names. ``content``: of config.json. ``has_tied_head``: a tied matrix is in the file twice."""

    directory: Path
    architecture: Architecture
    config: TransformerConfig
    vocab_size: int
    weights: dict[str, Tensor]
    content: dict[str, Any]
    has_tied_head: bool

    def into(self, model: Transformer) -> None:
        """Fill a model of ``config``, which may hold any part of the experts. Raises UserError for another model."""
        if self.architecture == "dist_moe":
            wanted = model.state_dict().keys() - ({"head.weight"} if self.config.tied_embeddings else set())
            check_names(self.directory, set(self.weights), set(wanted), "the model")
        place_weights(model, self.weights)


def read_decoder(directory: Path) -> DecoderCheckpoint:
    """A checkpoint directory of a known architecture.

    Raises UserError for a directory that is none, naming fields that cannot be followed, and every tensor that is
    missing or unknown.
    """
    content = read_config(directory)
    config, vocab_size = read_decoder_config(content)
    architecture = architecture_of(content)
    tensors = read_tensors(directory)
    has_tied_head = config.tied_embeddings and HEAD in tensors
    if has_tied_head and not torch.equal(tensors.pop(HEAD), tensors[TIED_TO]):
        raise UserError(f"{directory / WEIGHTS}: tie_word_embeddings=true, and {HEAD} is not {TIED_TO}")
    wanted = set(dense_names(config).values()) | stock_names(config, architecture)
    if architecture == "dist_moe":
        wanted |= {name for name in tensors if is_of_mixture(name, config)}
    check_names(directory, set(tensors), wanted, CLASSES[architecture])
    weights = to_ours(config, architecture, tensors)
    return DecoderCheckpoint(directory, architecture, config, vocab_size, weights, content, has_tied_head)


def write_decoder(
    model: Transformer,
    directory: Path,
    *,
    architecture: Architecture | None = None,
    like: DecoderCheckpoint | None = None,
    dtype: torch.dtype | None = None,
    positions: int = 2048,
    total_steps: int | None = None,
    tokenizer: Tokenizer | None = None,
    end_of_text: int | None = None,
    imports: Sequence[str] = (),
) -> Architecture:
    """Write a whole model as a directory that transformers loads; as what it was written.

    ``architecture``: None is the plainest one that fits. ``like``: the checkpoint whose config.json and precision are
    used where they fit the model. ``dtype``: of floating-point parameters; None: as they are. ``positions``: tokens
    that a sequence should have at most. ``total_steps``: of the training run, for gates with a schedule.
    ``tokenizer``: written along; ``end_of_text``: the id that begins and ends a text. ``imports``: modules that
    register gates of one's own. A table that is still being learnt is rounded as it stands.
    Raises UserError naming what the architecture has no place for, or if the directory cannot be written.
    """
    model.begin_evaluation()
    config, vocab_size = model.config, model.embedding.num_embeddings
    architecture = architecture or (like.architecture if like else plainest_architecture(config))
    options: dict[str, Any] = {"positions": positions, "total_steps": total_steps, "end_of_text": end_of_text}
    content = write_decoder_config(config, vocab_size, architecture, **options)
    if like is not None and like.architecture == architecture:
        same = write_decoder_config(like.config, like.vocab_size, architecture, **options) == content
        content = like.content if same else {**like.content, **content}
    else:
        content |= dtype_fields(dtype or model.embedding.weight.dtype)
    if architecture == "dist_moe":
        content |= DECODER.fields(imports)
    tensors = to_theirs(config, architecture, tensors_of(model, dtype, like.weights if like else {}))
    if like is not None and like.has_tied_head:
        tensors[HEAD] = tensors[TIED_TO].clone()
    write_directory(directory, content, tensors)
    if architecture == "dist_moe":
        DECODER.write(directory)
    if tokenizer is not None:
        end = None if end_of_text is None else tokenizer.id_to_token(end_of_text)
        write_tokenizer(directory, tokenizer, positions, dict.fromkeys(("bos_token", "eos_token"), end))
    return architecture
