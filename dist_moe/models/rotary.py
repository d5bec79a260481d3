"""Rotary position embeddings: what a query and a key make of one another depends on their distance alone.

Su, Lu, Pan, Murtadha, Wen, Liu: RoFormer (2021), eq. 34, in the layout of the Llama family: number i of a head of
width d is turned together with number i + d/2, at position p by the angle p theta^(-2i/d).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(length: int, head_dim: int, theta: float, like: Tensor) -> Tensor:
    """(2, S, head_dim / 2): cosines and sines of positions 0..S-1, on the device of ``like``, fp32 (fp64 if it is)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    exponent_P = torch.arange(0, head_dim, 2, device=like.device, dtype=dtype) / head_dim
    position_S = torch.arange(length, device=like.device, dtype=dtype)
    angle_SP = torch.outer(position_S, 1.0 / theta**exponent_P)
    return torch.stack([angle_SP.cos(), angle_SP.sin()])


def rotate(x_BHSD: Tensor, table_2SP: Tensor) -> Tensor:
    """The heads of every position turned by the angles of :func:`rotary_table`, in the precision of ``x_BHSD``."""
    cos_SP, sin_SP = table_2SP
    first, second = x_BHSD.to(table_2SP.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cos_SP - second * sin_SP, second * cos_SP + first * sin_SP], dim=-1)
    return turned.to(x_BHSD.dtype)
