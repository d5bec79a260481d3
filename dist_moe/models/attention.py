"""Causal self-attention in which several query heads share a key and a value head.

Ainslie et al.: GQA: Training Generalized Multi-Query Transformer Models (EMNLP 2023). As many key-value heads as
heads: multi-head attention; one: multi-query attention.

Positions are rotary: what a query and a key make of one another depends on their distance alone. Su, Lu, Pan, Murtadha,
Wen, Liu: RoFormer (2021), eq. 34, in the layout of the Llama family: number i of a head of width d is turned together
with number i + d/2, at position p by the angle p theta^(-2i/d).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_moe.models.dense import INIT_STD, linear


class CausalAttention(nn.Module):
    """``heads`` heads of width dim / heads; head h uses key-value head h // (heads / kv_heads). No biases.

    ``qk_norm_eps``: RMSNorm over all features of the queries and over all of the keys, before heads are split (OLMo 2,
    OLMoE), with that added to the mean square; None: none.
    Raises ValueError unless ``heads`` divides ``dim`` into an even width and ``kv_heads`` divides ``heads``.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, out_std: float = INIT_STD, qk_norm_eps: float | None = None
    ) -> None:
        super().__init__()
        if dim % heads or (dim // heads) % 2 or heads % kv_heads:
            raise ValueError(f"dim={dim}, heads={heads}, kv_heads={kv_heads} do not fit one another")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = dim // heads
        self.query = linear(dim, dim)
        self.key = linear(dim, kv_heads * self.head_dim)
        self.value = linear(dim, kv_heads * self.head_dim)
        self.out = linear(dim, dim, out_std)
        normed = qk_norm_eps is not None
        self.query_norm = nn.RMSNorm(dim, qk_norm_eps) if normed else None
        self.key_norm = nn.RMSNorm(kv_heads * self.head_dim, qk_norm_eps) if normed else None

    def forward(self, x_BSD: Tensor, table_2SP: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); ``table_2SP``: :func:`rotary_table` of the S positions."""
        query_BSD, key_BSQ = self.query(x_BSD), self.key(x_BSD)
        if self.query_norm is not None and self.key_norm is not None:
            query_BSD, key_BSQ = self.query_norm(query_BSD), self.key_norm(key_BSQ)
        query = rotate(self._by_head(query_BSD, self.heads), table_2SP)
        key = rotate(self._by_head(key_BSQ, self.kv_heads), table_2SP)
        value = self._by_head(self.value(x_BSD), self.kv_heads)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.kv_heads < self.heads)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result

    def _by_head(self, x_BSQ: Tensor, heads: int) -> Tensor:
        """(B, S, heads * width) -> (B, heads, S, width)."""
        return x_BSQ.unflatten(2, (heads, self.head_dim)).transpose(1, 2)


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
