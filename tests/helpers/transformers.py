"""Small transformers, and the same as loops over positions, heads, tokens and experts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.gates import (
    AdaMoEConfig,
    CometConfig,
    DSelectKConfig,
    GateConfig,
    GateContext,
    HashRoutingConfig,
    ReLUConfig,
    SMoEDropoutConfig,
    SoftmaxConfig,
    TopKConfig,
)
from dist_moe.layer import MoE
from dist_moe.models import RunShape, Transformer, TransformerConfig
from dist_moe.models.attention import CausalAttention
from dist_moe.models.transformer import GatedSwiGLU, SwiGLU
from dist_moe.parallel import SingleWorld, World
from dist_moe.search import PermutationSearch
from tests.helpers.branches import naive_branch_mix, naive_branch_relabel
from tests.helpers.oracle import naive_gate, naive_permutation_entropy

EACH_GATE: dict[str, GateConfig] = {
    "ada_moe": AdaMoEConfig(k=2, null_slots=2),
    "comet": CometConfig(k=2, gamma=1.0),
    "dselect_k": DSelectKConfig(k=2),
    "hash": HashRoutingConfig(),
    "relu": ReLUConfig(k=2),
    "smoe_dropout": SMoEDropoutConfig(k_min=2, k_max=2),
    "softmax": SoftmaxConfig(),
    "top_k": TopKConfig(k=2),
}
VOCABULARY = 11
SMALL: dict[str, Any] = {
    "layers": 2,
    "dim": 8,
    "heads": 4,
    "kv_heads": 2,
    "num_experts": 4,
    "experts": {"hidden": 5},
    "dense_hidden": 6,
    "moe_every": 2,
}


def make_transformer(world: World | None = None, **options: Any) -> Transformer:
    """SMALL with ``options``; random normalisation weights, and matrices large enough to matter."""
    torch.manual_seed(0)
    context = GateContext(torch.arange(1, VOCABULARY + 1), 10)
    model = TransformerConfig(**(SMALL | options)).build(VOCABULARY, RunShape(world or SingleWorld(), 10, context))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif ".gates." not in name and ".slot_map." not in name:
                parameter.mul_(15)
            if name.endswith(".bias") and ".attention." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def naive_transformer(model: Transformer, token_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(B, S, V) logits and the auxiliary losses, summed over layers."""
    aux: dict[str, Tensor] = {}
    x_BSD = model.embedding.weight[token_BS]
    for layer in model.layers:
        normed_BSD = _normed(x_BSD, layer.attention_norm)
        x_BSD = x_BSD + torch.stack([_attention(layer.attention, x_SD, model) for x_SD in normed_BSD])
        normed_TD = _normed(x_BSD, layer.feed_forward_norm).flatten(0, 1)
        if layer.moe is None:
            results = [_swiglu(layer.dense, x_D) for x_D in normed_TD]
        else:
            results, of_layer = _mixture(layer.moe, normed_TD, token_BS.flatten())
            aux = {name: aux.get(name, 0) + loss for name, loss in of_layer.items()}
        x_BSD = x_BSD + torch.stack(results).view_as(x_BSD)
    return _normed(x_BSD, model.norm) @ model.head.weight.T, aux


def _normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    assert norm.eps is not None
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def _attention(attention: CausalAttention, x_SD: Tensor, model: Transformer) -> Tensor:
    """Of one sequence: every head's softmax over the positions up to one's own, written out."""
    width, shared_by = attention.head_dim, attention.heads // attention.kv_heads
    query_SQ, key_SK = _projected(attention.query, x_SD), _projected(attention.key, x_SD)
    value_SK = _projected(attention.value, x_SD)
    if model.config.qk_norm == "all":
        query_SQ, key_SK = _normed(query_SQ, attention.query_norm), _normed(key_SK, attention.key_norm)
    theta = model.config.rope_theta
    rows = []
    for here in range(len(x_SD)):
        heads = []
        for head in range(attention.heads):
            own = slice(head * width, (head + 1) * width)
            lent = slice(head // shared_by * width, (head // shared_by + 1) * width)
            query = _turned(_of_head(query_SQ[here, own], attention.query_norm, model), here, theta)
            scores, values = [], []
            for there in range(here + 1):
                key = _turned(_of_head(key_SK[there, lent], attention.key_norm, model), there, theta)
                scores.append((query @ key / math.sqrt(width)).exp())
                values.append(value_SK[there, lent])
            total = sum(scores)
            heads.append(sum(score / total * value for score, value in zip(scores, values, strict=True)))
        rows.append(attention.out.weight @ torch.cat(heads))
    return torch.stack(rows)


def _projected(linear: nn.Linear, x_SD: Tensor) -> Tensor:
    bias = 0 if linear.bias is None else linear.bias
    return torch.stack([linear.weight @ x_D + bias for x_D in x_SD])


def _of_head(x_H: Tensor, norm: nn.RMSNorm | None, model: Transformer) -> Tensor:
    if model.config.qk_norm != "head":
        return x_H
    assert norm is not None
    return _normed(x_H, norm)


def _turned(x_H: Tensor, position: int, theta: float) -> Tensor:
    """As complex numbers: entry i and entry i + d/2 are one, multiplied by e^(i position theta^(-2i/d))."""
    half = len(x_H) // 2
    first, second = [], []
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x_H))
        first.append(x_H[i] * math.cos(angle) - x_H[i + half] * math.sin(angle))
        second.append(x_H[i] * math.sin(angle) + x_H[i + half] * math.cos(angle))
    return torch.stack(first + second)


def _swiglu(network: SwiGLU, x_D: Tensor) -> Tensor:
    gate = network.gate.weight @ x_D
    return network.down.weight @ (gate / (1 + (-gate).exp()) * (network.up.weight @ x_D))


def _shared(network: SwiGLU, x_D: Tensor) -> Tensor:
    share = network.share.weight @ x_D if isinstance(network, GatedSwiGLU) else None
    return _swiglu(network, x_D) / (1 if share is None else 1 + (-share).exp())


def _mixture(moe: MoE, x_TD: Tensor, ids_T: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    mixture_TE, aux = naive_gate(moe.gates[0], x_TD, ids_T)
    search = moe.slot_map
    if isinstance(search, PermutationSearch) and search.training and search.learning:
        soft = search.soft_matrix()[0, 0]
        mixture_TE = naive_branch_mix(mixture_TE, soft.unsqueeze(0))
        aux = aux | {"permutation": search.entropy_weight * naive_permutation_entropy(soft)}
    else:
        mixture_TE = naive_branch_relabel(mixture_TE, search.table[0], moe.experts.num_experts)
    bank, results = moe.experts, []
    for weight_E, x_D in zip(mixture_TE, x_TD, strict=True):
        total = torch.zeros_like(x_D) if moe.shared is None else _shared(moe.shared, x_D)
        for expert, weight in enumerate(weight_E):
            gate = x_D @ bank.gate[expert]
            active = gate / (1 + (-gate).exp()) * (x_D @ bank.up[expert])
            total = total + weight * (active @ bank.down[expert])
        results.append(total)
    return results, aux
