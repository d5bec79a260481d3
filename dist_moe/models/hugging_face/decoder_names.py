"""The tensors of a decoder under Hugging Face's names and under ours, there and back, every one accounted for.

Ours are those of ``state_dict``: parameters, experts stacked by global id, and buffers. Matrices outside of experts
are the same on both sides. Mixtral and OLMoE have every expert's matrices one by one and transposed; a slot -> expert
table is folded into their routers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dist_moe.errors import UserError
from dist_moe.models.hugging_face.decoder_config import CLASSES, Architecture
from dist_moe.models.transformer import TransformerConfig

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
_OF_NORMED_HEADS = {f"attention.{name}_norm": f"self_attn.{name[0]}_norm" for name in ("query", "key")}
_OF_EXPERT = {
    "mixtral": {"gate": "w1", "down": "w2", "up": "w3"},
    "olmoe": {name: f"{name}_proj" for name in ("gate", "down", "up")},
}


def dense_names(config: TransformerConfig) -> dict[str, str]:
    """Their name of every parameter of ours outside of MoE layers."""
    modules = dict(_MODULES)
    for layer in range(config.layers):
        of_layer = _OF_LAYER if config.has_experts(layer) else _OF_LAYER | _OF_DENSE_LAYER
        of_layer = of_layer | (_OF_NORMED_HEADS if config.qk_norm else {})
        modules |= {f"layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in of_layer.items()}
    if config.tied_embeddings:
        del modules["head"]
    return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in modules.items()}


def stock_names(config: TransformerConfig, architecture: Architecture) -> set[str]:
    """Their names of all that MoE layers have, in an architecture of transformers' own; Llama has none."""
    if architecture not in _OF_EXPERT:
        return set()
    blocks = [_stock_block(architecture, layer) for layer in range(config.layers)]
    routers = {f"{block}.gate.weight" for block in blocks}
    return routers | {
        f"{block}.experts.{expert}.{matrix}.weight"
        for block in blocks
        for expert in range(config.num_experts)
        for matrix in _OF_EXPERT[architecture].values()
    }


def to_theirs(config: TransformerConfig, architecture: Architecture, state: Tensors) -> dict[str, Tensor]:
    """From ``state_dict()`` of a whole model, whose table is no longer being learnt."""
    rest = dict(state)
    if config.tied_embeddings:
        rest.pop("head.weight", None)
    tensors = {theirs: rest.pop(ours) for ours, theirs in dense_names(config).items()}
    for layer in range(config.layers):
        prefix = f"layers.{layer}.moe."
        block = {name.removeprefix(prefix): rest.pop(name) for name in list(rest) if name.startswith(prefix)}
        if architecture in _OF_EXPERT:
            stock = _to_stock(architecture, block).items()
            tensors |= {f"{_stock_block(architecture, layer)}.{name}": tensor for name, tensor in stock}
        else:
            tensors |= {f"{_own_block(layer)}.{name}": tensor for name, tensor in block.items()}
    assert not rest, f"no name for {sorted(rest)}"
    return tensors


def to_ours(config: TransformerConfig, architecture: Architecture, tensors: Tensors) -> dict[str, Tensor]:
    """Back; ``tensors`` must have all of :func:`dense_names`, and of :func:`stock_names`."""
    weights = {ours: tensors[theirs] for ours, theirs in dense_names(config).items()}
    for layer in range(config.layers):
        if architecture in _OF_EXPERT:
            block = _from_stock(config, architecture, tensors, _stock_block(architecture, layer))
        else:
            prefix = f"{_own_block(layer)}."
            block = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        weights |= {f"layers.{layer}.moe.{name}": tensor for name, tensor in block.items()}
    return weights


def is_of_mixture(name: str, config: TransformerConfig) -> bool:
    """Whether their ``name`` is one that MoE layers of our own architecture may have."""
    layers = (layer for layer in range(config.layers) if config.has_experts(layer))
    return name.startswith(tuple(f"{_own_block(layer)}." for layer in layers))


def _to_stock(architecture: Architecture, block: dict[str, Tensor]) -> dict[str, Tensor]:
    table = block["slot_map.table"].flatten()
    slot_of_E = table.argsort()
    if "gates.0.allowed_E" in block or table[slot_of_E].tolist() != list(range(len(table))):
        raise UserError(
            f"{CLASSES[architecture]} has no place for slots that share an expert or that a gate must not choose; "
            "write the model with --architecture=dist_moe"
        )
    tensors = {"gate.weight": block["gates.0.weight"][slot_of_E]}
    for ours, theirs in _OF_EXPERT[architecture].items():
        for expert, weight in enumerate(block[f"experts.{ours}"]):
            tensors[f"experts.{expert}.{theirs}.weight"] = weight.T
    unknown = [name for name in block if not name.startswith(("slot_map.", "experts."))]
    assert unknown == ["gates.0.weight"], f"no name for {unknown}"
    return tensors


def _from_stock(
    config: TransformerConfig, architecture: Architecture, tensors: Tensors, block: str
) -> dict[str, Tensor]:
    weights = {"gates.0.weight": tensors[f"{block}.gate.weight"]}
    for ours, theirs in _OF_EXPERT[architecture].items():
        of_experts = [tensors[f"{block}.experts.{expert}.{theirs}.weight"].T for expert in range(config.num_experts)]
        weights[f"experts.{ours}"] = torch.stack(of_experts)
    return weights


def _stock_block(architecture: Architecture, layer: int) -> str:
    return f"model.layers.{layer}.{'block_sparse_moe' if architecture == 'mixtral' else 'mlp'}"


def _own_block(layer: int) -> str:
    return f"model.layers.{layer}.mlp.moe"
