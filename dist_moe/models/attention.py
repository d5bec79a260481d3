"""Causal self-attention of decoders: grouped queries, rotary positions, normalised queries and keys.

Grouped-query attention: several query heads share a key and a value head (Ainslie et al., EMNLP 2023). Rotary
positions: a score depends on the distance of query and key alone (Su, Lu, Pan, Murtadha, Wen, Liu: RoFormer, 2021,
eq. 34), in the layout of the Llama family: number i of a head of width d is turned together with number i + d/2, at
position p by the angle p theta^(-2i/d).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02

QKNorm = Literal["none", "all", "head"]
"""How queries and keys are normalised: not at all, over all of their features, or each head by itself."""


def linear(dim: int, out_dim: int, std: float = INIT_STD, *, bias: bool = False) -> nn.Linear:
    """Return a layer with weights from N(0, std), and biases of 0 if any."""
    layer = nn.Linear(dim, out_dim, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class CausalAttention(nn.Module):
    """Causal self-attention with ``heads`` heads of width ``head_dim``.

    Head h uses key-value head h // (heads / kv_heads): as many as heads is multi-head attention, one is multi-query
    attention. ``qk_norm``: RMSNorm over all features of the queries and over all of the keys, before heads are split
    (OLMo 2, OLMoE), or over those of each head, with one weight for all of them (Qwen3). ``norm_eps``: added to the
    mean square. ``qkv_bias``: biases of all but the last projection. Raises ValueError unless heads have an even width
    and ``kv_heads`` divides ``heads``.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        out_std: float = INIT_STD,
        qk_norm: QKNorm = "none",
        norm_eps: float = 1e-5,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        if head_dim % 2 or heads % kv_heads:
            raise ValueError(f"heads={heads}, kv_heads={kv_heads}, head_dim={head_dim} do not fit one another")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        queries, keys = heads * head_dim, kv_heads * head_dim
        self.query = linear(dim, queries, bias=qkv_bias)
        self.key = linear(dim, keys, bias=qkv_bias)
        self.value = linear(dim, keys, bias=qkv_bias)
        self.out = linear(queries, dim, out_std)
        self.query_norm: nn.RMSNorm | None = None
        self.key_norm: nn.RMSNorm | None = None
        if qk_norm != "none":
            self.query_norm = nn.RMSNorm(head_dim if qk_norm == "head" else queries, norm_eps)
            self.key_norm = nn.RMSNorm(head_dim if qk_norm == "head" else keys, norm_eps)

    def forward(self, x_BSD: Tensor, table_2SP: Tensor) -> Tensor:
        """Return (B, S, D) rows mixed over earlier positions; ``table_2SP``: :func:`rotary_table` of S positions."""
        query, key, value = self.query(x_BSD), self.key(x_BSD), self.value(x_BSD)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = normalised(query, self.query_norm), normalised(key, self.key_norm)
        shape = (-1, self.head_dim)  # (B, S, heads * width) -> (B, heads, S, width)
        query = rotate(query.unflatten(2, shape).transpose(1, 2), table_2SP)
        key = rotate(key.unflatten(2, shape).transpose(1, 2), table_2SP)
        value = value.unflatten(2, shape).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.kv_heads < self.heads)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result


def normalised(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """Return (..., W) rows of which every part as wide as ``norm`` is normalised: whole rows, or heads of them."""
    rows: Tensor = norm(x.unflatten(-1, (-1, *norm.normalized_shape)))
    return rows.flatten(-2)


def rotary_table(length: int, head_dim: int, theta: float, like: Tensor) -> Tensor:
    """Return (2, S, head_dim / 2) cosines and sines of positions 0..S-1, on ``like``'s device, fp32 (fp64 if it is)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent_P = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim
    position_S = torch.arange(length, device=like.device, dtype=dtype)
    angle_SP = torch.outer(position_S, 1.0 / theta**exponent_P)
    return torch.stack([angle_SP.cos(), angle_SP.sin()])


def rotate(x_BHSD: Tensor, table_2SP: Tensor) -> Tensor:
    """Return ``x_BHSD``, every position turned by its angles in :func:`rotary_table`, in its own precision."""
    cos_SP, sin_SP = table_2SP
    first, second = x_BHSD.to(table_2SP.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos_SP - second * sin_SP, second * cos_SP + first * sin_SP], dim=-1)
    return turned.to(x_BHSD.dtype)
