"""Decoder language models as Hugging Face keeps them, there and back.

    checkpoint = read_decoder(directory)                     # a directory of one of families.py
    model = checkpoint.config.build(checkpoint.vocab_size, run)
    checkpoint.into(model)
    write_decoder(model, other)                              # the plainest architecture that has a place for all of it
    write_decoder(model, other, like=checkpoint)             # as it was read, to the bit

Every tensor is accounted for by name, and anything else is refused. Needs no transformers.

Our names are those of ``state_dict``: parameters, experts stacked by global id, and buffers. Matrices outside of
experts are the same on both sides. transformers' own architectures with experts have every expert's matrices one by one
and transposed; a slot -> expert table is folded into their routers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dist_moe.engine.checkpoint import place_weights
from dist_moe.errors import UserError
from dist_moe.experts import FeedForwardConfig
from dist_moe.models.hugging_face.decoder_config import read_decoder_config, write_decoder_config
from dist_moe.models.hugging_face.families import FAMILIES, OURS, Family, plainest_architecture
from dist_moe.models.hugging_face.files import (
    CONFIG,
    DECODER,
    WEIGHTS,
    WEIGHTS_ARE,
    check_names,
    check_tensors,
    dtype_fields,
    read_config,
    read_tensors,
    tensors_of,
    without_buffers,
    write_directory,
    write_tokenizer,
)
from dist_moe.models.transformer import Transformer, TransformerConfig

Tensors = Mapping[str, Tensor]

HEAD, TIED_TO = "lm_head.weight", "model.embed_tokens.weight"

_MODULES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_OF_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
}
_OF_DENSE_LAYER = {f"dense.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@dataclass(frozen=True)
class DecoderCheckpoint:
    """A decoder's directory. ``weights``: by our names. ``content``: of config.json. ``has_tied_head``: whether a tied
    matrix is in the file twice."""

    directory: Path
    architecture: str
    config: TransformerConfig
    vocab_size: int
    weights: dict[str, Tensor]
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


def read_decoder(directory: Path) -> DecoderCheckpoint:
    """Return a checkpoint directory of a known architecture.

    Raises UserError for a directory that is none, naming fields that cannot be followed, and every tensor that is
    missing or unknown.
    """
    content = read_config(directory)
    try:
        config, vocab_size = read_decoder_config(content)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error
    architecture: str = content["model_type"]
    family = FAMILIES[architecture]
    tensors = without_buffers(read_tensors(directory))
    _check_counts(directory, config, family, tensors)
    has_tied_head = config.tied_embeddings and HEAD in tensors
    if has_tied_head and not _same(tensors.pop(HEAD), tensors.get(TIED_TO)):
        raise UserError(f"{directory / WEIGHTS}: tie_word_embeddings=true, and {HEAD} is not {TIED_TO}")
    wanted = set(_dense_names(config, family).values())
    for layer in filter(config.has_experts, range(config.layers)):
        prefix = f"{_block(family, layer)}."
        if family.has_experts:
            wanted |= {prefix + name for name in _stock_names(family, config.num_experts)}
        else:
            wanted |= {name for name in tensors if name.startswith(prefix)}
    check_names(directory, set(tensors), wanted, family.class_name)
    check_tensors(directory, tensors, _shapes(config, vocab_size, family))
    weights = _to_ours(config, family, tensors)
    return DecoderCheckpoint(directory, architecture, config, vocab_size, weights, content, has_tied_head)


def write_decoder(
    model: Transformer,
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
    """Write a whole model as a directory that transformers loads; return the architecture.

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
    if architecture == OURS:
        content |= DECODER.fields(imports)
    tensors = _to_theirs(config, FAMILIES[architecture], tensors_of(model, dtype, like.weights if like else {}))
    if like is not None and like.has_tied_head:
        tensors[HEAD] = tensors[TIED_TO].clone()
    write_directory(directory, content, tensors)
    if architecture == OURS:
        DECODER.write(directory)
    if tokenizer is not None:
        end = None if end_of_text is None else tokenizer.id_to_token(end_of_text)
        write_tokenizer(directory, tokenizer, positions, dict.fromkeys(("bos_token", "eos_token"), end))
    return architecture


def _dense_names(config: TransformerConfig, family: Family) -> dict[str, str]:
    """Return their name of every parameter of ours outside of MoE layers."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _MODULES.items()}
    for layer in range(config.layers):
        modules = _OF_LAYER if config.has_experts(layer) else _OF_LAYER | _OF_DENSE_LAYER
        of_layer = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in modules.items()}
        of_layer |= family.attention_names(config)
        names |= {f"layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in of_layer.items()}
    if config.tied_embeddings:
        del names["head.weight"]
    return names


def _shapes(config: TransformerConfig, vocab_size: int, family: Family) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors by their names, but for MoE layers of our own architecture."""
    dim, queries, keys = config.dim, config.width_of_queries, config.width_of_keys
    by_head = config.qk_norm == "head"
    of_parameter = {
        **dict.fromkeys(("embedding.weight", "head.weight"), (vocab_size, dim)),
        **dict.fromkeys(("norm.weight", "attention_norm.weight", "feed_forward_norm.weight"), (dim,)),
        "query_norm.weight": (config.head_width if by_head else queries,),
        "key_norm.weight": (config.head_width if by_head else keys,),
        "query.weight": (queries, dim),
        "out.weight": (dim, queries),
        **dict.fromkeys(("key.weight", "value.weight"), (keys, dim)),
        "query.bias": (queries,),
        **dict.fromkeys(("key.bias", "value.bias"), (keys,)),
        **_swiglu_shapes(dim, config.dense_hidden),
    }
    names = _dense_names(config, family).items()
    shapes = {theirs: of_parameter[".".join(ours.split(".")[-2:])] for ours, theirs in names}
    if not family.has_experts:
        return shapes
    assert isinstance(config.experts, FeedForwardConfig)
    of_expert = _swiglu_shapes(dim, config.experts.hidden)
    of_shared = _swiglu_shapes(dim, config.shared_hidden or 0) | {"share.weight": (1, dim)}
    for layer in filter(config.has_experts, range(config.layers)):
        prefix = _block(family, layer)
        shapes[f"{prefix}.gate.weight"] = (config.num_experts, dim)
        for ours, theirs in family.shared_names().items():
            shapes[f"{prefix}.{theirs}"] = of_shared[ours.removeprefix("shared.")]
        for expert in range(config.num_experts):
            for ours, theirs in family.matrices.items():
                shapes[f"{prefix}.experts.{expert}.{theirs}.weight"] = of_expert[f"{ours}.weight"]
    return shapes


def _swiglu_shapes(dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {"gate.weight": (hidden, dim), "up.weight": (hidden, dim), "down.weight": (dim, hidden)}


def _check_counts(directory: Path, config: TransformerConfig, family: Family, tensors: Tensors) -> None:
    """Raise UserError for more layers or experts than there can be: nothing of that size shall be built."""
    if config.layers > len(tensors):
        raise UserError(f"{directory / CONFIG} says {config.layers:,} layers, and there are {len(tensors)} tensors")
    if not config.moe_every:
        return
    if family.has_experts:
        others = ["the tensors"] if config.num_experts > len(tensors) else []
    else:
        stacks = {name: tensor.shape[:1] for name, tensor in tensors.items() if ".moe.experts." in name}
        others = [name for name, rows in stacks.items() if rows != (config.num_experts,)]
    if others:
        raise UserError(f"{directory / CONFIG} says {config.num_experts:,} experts, and {others[0]} has another number")


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


def _block(family: Family, layer: int) -> str:
    """Return how their names of a layer's experts begin."""
    return f"model.layers.{layer}.{family.block}"


def _stock_names(family: Family, experts: int) -> set[str]:
    """Return their names of all that an MoE layer has, in an architecture of transformers' own."""
    matrices = family.matrices.values()
    of_experts = {f"experts.{expert}.{name}.weight" for expert in range(experts) for name in matrices}
    return {"gate.weight", *family.shared_names().values()} | of_experts


def _to_theirs(config: TransformerConfig, family: Family, state: Tensors) -> dict[str, Tensor]:
    """Return by their names the ``state_dict()`` of a whole model, whose table is no longer being learnt."""
    rest = dict(state)
    if config.tied_embeddings:
        rest.pop("head.weight", None)
    tensors = {theirs: rest.pop(ours) for ours, theirs in _dense_names(config, family).items()}
    for layer in range(config.layers):
        prefix = f"layers.{layer}.moe."
        block = {name.removeprefix(prefix): rest.pop(name) for name in list(rest) if name.startswith(prefix)}
        if block and family.has_experts:
            block = _to_stock(family, block)
        tensors |= {f"{_block(family, layer)}.{name}": tensor for name, tensor in block.items()}
    assert not rest, f"no name for {sorted(rest)}"
    return tensors


def _to_ours(config: TransformerConfig, family: Family, tensors: Tensors) -> dict[str, Tensor]:
    """Return by our names the tensors that were accounted for."""
    weights = {ours: tensors[theirs] for ours, theirs in _dense_names(config, family).items()}
    for layer in filter(config.has_experts, range(config.layers)):
        prefix = f"{_block(family, layer)}."
        block = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if family.has_experts:
            stacked = {"gates.0.weight": block["gate.weight"]}
            stacked |= {ours: block[theirs] for ours, theirs in family.shared_names().items()}
            for ours, theirs in family.matrices.items():
                matrices = [block[f"experts.{expert}.{theirs}.weight"].T for expert in range(config.num_experts)]
                stacked[f"experts.{ours}"] = torch.stack(matrices)
            block = stacked
        weights |= {f"layers.{layer}.moe.{name}": tensor for name, tensor in block.items()}
    return weights


def _to_stock(family: Family, block: dict[str, Tensor]) -> dict[str, Tensor]:
    table = block["slot_map.table"].flatten()
    slot_of_E = table.argsort()
    if "gates.0.allowed_E" in block or table[slot_of_E].tolist() != list(range(len(table))):
        raise UserError(
            f"{family.class_name} has no place for slots that share an expert or that a gate must not choose; "
            "write the model with --architecture=dist_moe"
        )
    tensors = {"gate.weight": block["gates.0.weight"][slot_of_E]}
    tensors |= {theirs: block[ours] for ours, theirs in family.shared_names().items()}
    for ours, theirs in family.matrices.items():
        for expert, weight in enumerate(block[f"experts.{ours}"]):
            tensors[f"experts.{expert}.{theirs}.weight"] = weight.T
    unknown = {name for name in block if not name.startswith(("slot_map.", "experts."))} - family.shared_names().keys()
    assert unknown == {"gates.0.weight"}, f"no name for {unknown}"
    return tensors
