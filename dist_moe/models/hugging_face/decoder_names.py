"""Tensors of a decoder under our names and under those of a directory, there and back, read when they are asked for.

Our names are those of ``state_dict``: parameters, experts stacked by global id, and buffers. Matrices outside of
experts are the same on both sides. transformers' own architectures with experts have every expert's matrices one by one
and transposed; a slot -> expert table is folded into their routers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dist_moe.engine.checkpoint import ModelWeights
from dist_moe.engine.checkpoint.format import BUFFER, DENSE, EXPERTS
from dist_moe.engine.checkpoint.safetensors_writer import TensorSpec
from dist_moe.errors import UserError
from dist_moe.experts import FeedForwardConfig
from dist_moe.models.hugging_face.families import Family
from dist_moe.models.hugging_face.files import Pieces, StoredTensors
from dist_moe.models.transformer import TransformerConfig

Read = Callable[[int | None], Tensor]
"""Gives a tensor, or the part of it that is one expert's."""

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


def dense_names(config: TransformerConfig, family: Family) -> dict[str, str]:
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


def tensor_shapes(config: TransformerConfig, vocab_size: int, family: Family) -> dict[str, tuple[int, ...]]:
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
    names = dense_names(config, family).items()
    shapes = {theirs: of_parameter[".".join(ours.split(".")[-2:])] for ours, theirs in names}
    if not family.has_experts:
        return shapes
    assert isinstance(config.experts, FeedForwardConfig)
    of_expert = _swiglu_shapes(dim, config.experts.hidden)
    of_shared = _swiglu_shapes(dim, config.shared_hidden or 0) | {"share.weight": (1, dim)}
    for layer in filter(config.has_experts, range(config.layers)):
        prefix = block_of(family, layer)
        shapes[f"{prefix}.gate.weight"] = (config.num_experts, dim)
        for ours, theirs in family.shared_names().items():
            shapes[f"{prefix}.{theirs}"] = of_shared[ours.removeprefix("shared.")]
        for expert in range(config.num_experts):
            for ours, theirs in family.matrices.items():
                shapes[f"{prefix}.experts.{expert}.{theirs}.weight"] = of_expert[f"{ours}.weight"]
    return shapes


def _swiglu_shapes(dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {"gate.weight": (hidden, dim), "up.weight": (hidden, dim), "down.weight": (dim, hidden)}


def block_of(family: Family, layer: int) -> str:
    """Return how their names of a layer's experts begin."""
    return f"model.layers.{layer}.{family.block}"


def stock_names(family: Family, experts: int) -> set[str]:
    """Return their names of all that an MoE layer has, in an architecture of transformers' own."""
    matrices = family.matrices.values()
    of_experts = {f"experts.{expert}.{name}.weight" for expert in range(experts) for name in matrices}
    return {"gate.weight", *family.shared_names().values()} | of_experts


class _Entry(NamedTuple):
    kind: str
    spec: TensorSpec
    read: Read


def to_ours(config: TransformerConfig, family: Family, tensors: StoredTensors) -> ModelWeights:
    """Return by our names the tensors that were accounted for, with the slot maps that stock architectures have not.

    In a directory of ours, which does not say what is a buffer, all is one that does not consist of real numbers.
    """
    entries = {ours: _entry(tensors, theirs) for ours, theirs in dense_names(config, family).items()}
    for layer in filter(config.has_experts, range(config.layers)):
        prefix = f"{block_of(family, layer)}."
        if family.has_experts:
            block = _of_stock(config, family, tensors, prefix)
        else:
            block = {}
            for name, spec in tensors.specs.items():
                if name.startswith(prefix):
                    kind = EXPERTS if name.startswith(f"{prefix}experts.") else DENSE
                    kind = kind if spec.dtype.is_floating_point else BUFFER
                    block[name.removeprefix(prefix)] = _Entry(kind, spec, partial(tensors.read, name))
        entries |= {f"layers.{layer}.moe.{name}": entry for name, entry in block.items()}
    kinds = {name: entry.kind for name, entry in entries.items()}
    specs = {name: entry.spec for name, entry in entries.items()}
    return ModelWeights(kinds, specs, lambda name, expert: entries[name].read(expert))


def _entry(tensors: StoredTensors, name: str) -> _Entry:
    return _Entry(DENSE, tensors.specs[name], partial(tensors.read, name))


def _of_stock(config: TransformerConfig, family: Family, tensors: StoredTensors, prefix: str) -> dict[str, _Entry]:
    """An MoE layer of an architecture of transformers' own, by our names within it."""
    block = {"gates.0.weight": _entry(tensors, f"{prefix}gate.weight")}
    block |= {ours: _entry(tensors, prefix + theirs) for ours, theirs in family.shared_names().items()}
    for ours, theirs in family.matrices.items():

        def read(expert: int | None, matrix: str = theirs) -> Tensor:
            return tensors.read(f"{prefix}experts.{expert}.{matrix}.weight").T

        spec = tensors.specs[f"{prefix}experts.0.{theirs}.weight"]
        block[f"experts.{ours}"] = _Entry(
            EXPERTS, TensorSpec(spec.dtype, (config.num_experts, *reversed(spec.shape))), read
        )
    table = torch.arange(config.num_experts).view(1, 1, -1)
    return block | {"slot_map.table": _Entry(BUFFER, TensorSpec.of(table), lambda _: table)}


def to_theirs(
    config: TransformerConfig, family: Family, weights: ModelWeights, dtype_of: Callable[[str], torch.dtype]
) -> dict[str, Pieces]:
    """Return by their names the tensors of a whole model, whose tables are no longer being learnt.

    ``dtype_of``: precision of each of our parameters. Raises UserError for slot maps that ``family`` cannot have.
    """

    def pieces(name: str, parts: Callable[[], Iterator[Tensor]], shape: tuple[int, ...]) -> Pieces:
        spec = weights.specs[name]
        dtype = spec.dtype if weights.kinds[name] == BUFFER else dtype_of(name)
        return Pieces(TensorSpec(dtype, shape), lambda: (part.detach().to(dtype) for part in parts()))

    def whole(name: str) -> Pieces:
        return pieces(name, lambda: weights.pieces(name), weights.specs[name].shape)

    dense = dense_names(config, family)
    tensors = {theirs: whole(ours) for ours, theirs in dense.items()}
    rest = weights.keys() - dense.keys() - {"head.weight"}
    for layer in filter(config.has_experts, range(config.layers)):
        prefix, block = f"layers.{layer}.moe.", block_of(family, layer)
        of_layer = {name for name in rest if name.startswith(prefix)}
        rest -= of_layer
        if not family.has_experts:
            tensors |= {f"{block}.{name.removeprefix(prefix)}": whole(name) for name in of_layer}
            continue
        slot_of_E = _slots_of_experts(family, weights, prefix)
        router = f"{prefix}gates.0.weight"
        gate = pieces(router, partial(_rows, weights, router, slot_of_E), weights.specs[router].shape)
        tensors |= {f"{block}.gate.weight": gate}
        tensors |= {f"{block}.{theirs}": whole(prefix + ours) for ours, theirs in family.shared_names().items()}
        for ours, theirs in family.matrices.items():
            name = f"{prefix}experts.{ours}"
            shape = weights.specs[name].shape
            for expert in range(shape[0]):
                one = pieces(name, partial(_transposed, weights, name, expert), (shape[2], shape[1]))
                tensors[f"{block}.experts.{expert}.{theirs}.weight"] = one
        known = {router, *(prefix + ours for ours in family.shared_names())}
        unknown = {n for n in of_layer if not n.startswith((f"{prefix}slot_map.", f"{prefix}experts."))} - known
        assert not unknown, f"no name for {unknown}"
    assert not rest, f"no name for {sorted(rest)}"
    return tensors


def _rows(weights: ModelWeights, name: str, order_E: Tensor) -> Iterator[Tensor]:
    yield weights.read(name, None)[order_E]


def _transposed(weights: ModelWeights, name: str, expert: int) -> Iterator[Tensor]:
    yield weights.read(name, expert).T


def _slots_of_experts(family: Family, weights: ModelWeights, prefix: str) -> Tensor:
    """Return (E,): the slot of each expert, by which the rows of a router are put in order."""
    table = weights[f"{prefix}slot_map.table"].flatten()
    slot_of_E = table.argsort()
    if f"{prefix}gates.0.allowed_E" in weights or table[slot_of_E].tolist() != list(range(len(table))):
        raise UserError(
            f"{family.class_name} has no place for slots that share an expert or that a gate must not choose; "
            "write the model with architecture=dist_moe, or fold it before"
        )
    return slot_of_E
