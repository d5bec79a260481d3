"""Formats of token rows and their gradients on the wire: as they are, in bf16, or in fp8 with a scale per row.

A row is rounded before it is sent, and has its own dtype again where it arrives. Rows that stay on their rank are
rounded too, so that the result does not depend on where an expert lives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WireName = Literal["bf16", "fp8_e4m3"]

_FP8 = torch.float8_e4m3fn
_FP8_EXPONENT = 8  # of 256; the largest number of the format is 448
_LARGEST_EXPONENT = 126  # of a scale whose reciprocal is a normal number, too
_NOT_FINITE = -128


@dataclass(frozen=True)
class RowFormat:
    r"""A format of rows on the wire. ``encode``: rows (N, ...) -> what is sent of them, as many rows;
    ``decode(sent, dtype, shape)``: that -> (N, \*shape) of ``dtype``. Rows whose numbers have ``number_bytes`` or fewer
    are sent as they are."""

    number_bytes: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, torch.dtype, torch.Size], Tensor]


BF16_ROWS = RowFormat(2, lambda x_ND: x_ND.to(torch.bfloat16), lambda sent_NB, dtype, _: sent_NB.to(dtype))
"""Rows whose numbers are rounded to bf16: an error of at most 2**-8 of each."""


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def _encode_fp8(x_ND: Tensor) -> Tensor:
    """(N, width + 1) bytes: the scaled numbers, then the exponent of the scale."""
    x_NB = x_ND.flatten(1).float()
    largest_N1 = x_NB.abs().amax(dim=1, keepdim=True)
    exponent_N1 = (torch.frexp(largest_N1).exponent - _FP8_EXPONENT).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    sent_NB = torch.empty(len(x_NB), x_NB.shape[1] + 1, dtype=torch.uint8, device=x_NB.device)
    sent_NB[:, :-1] = (x_NB * _power_of_two(-exponent_N1)).to(_FP8).view(torch.uint8)
    marked_N1 = torch.where(largest_N1.isfinite(), exponent_N1, _NOT_FINITE)
    sent_NB[:, -1:] = marked_N1.to(torch.int8).view(torch.uint8)
    return sent_NB


def _decode_fp8(sent_NB: Tensor, dtype: torch.dtype, shape_of_row: torch.Size) -> Tensor:
    exponent_N1 = sent_NB[:, -1:].contiguous().view(torch.int8).int()
    scale_N1 = torch.where(exponent_N1 == _NOT_FINITE, torch.nan, _power_of_two(exponent_N1))
    numbers_NB = sent_NB[:, :-1].contiguous().view(_FP8).float()
    return (numbers_NB * scale_N1).to(dtype).view(-1, *shape_of_row)


FP8_ROWS = RowFormat(1, _encode_fp8, _decode_fp8)
"""Rows of float8_e4m3fn numbers (Micikevicius et al., FP8 formats for deep learning, 2022) and one scale per row.

The scale is a power of two, kept as its exponent in one byte behind the row, as microscaling formats (OCP,
2023) keep theirs: it moves the row's largest number into 128..256 and rounds nothing. The error is at most
2**-4 of a number, or 2**-17 of the row's largest number where that is more (rows whose largest number is
below 2**-117 lose more). A row with a number that is not finite in fp32 arrives as NaN throughout.
"""


@dataclass(frozen=True)
class Wire:
    """The formats in which rows travel: ``rows``, that of tokens and results in the forward pass; ``gradients``, that
    of their gradients on the way back. None: as they are."""

    rows: RowFormat | None = None
    gradients: RowFormat | None = None


WIRES: dict[str | None, Wire] = {
    None: Wire(),
    "bf16": Wire(BF16_ROWS, BF16_ROWS),
    "fp8_e4m3": Wire(FP8_ROWS, BF16_ROWS),
}
"""By the name in the configuration. Gradients never travel in fp8: what is small in a row of them still counts."""


def encoded(x_ND: Tensor, form: RowFormat | None) -> Tensor:
    """Return what is sent of the rows; without a format, or where it saves nothing, the rows themselves."""
    return x_ND if form is None or x_ND.dtype.itemsize <= form.number_bytes else form.encode(x_ND)


def decoded(received_NB: Tensor, form: RowFormat | None, like_ND: Tensor) -> Tensor:
    """Return the rows that :func:`encoded` has packed, in the dtype and of the width of ``like_ND``."""
    if form is None or like_ND.dtype.itemsize <= form.number_bytes:
        return received_NB
    return form.decode(received_NB, like_ND.dtype, like_ND.shape[1:])
