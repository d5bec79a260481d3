"""Sequences of different lengths without their padding: the rows that are real, and the way back.

Everything but attention works on single tokens. So a model keeps (T, D) rows of real tokens, one sequence after
another, and pads only for attention: no gate ever sees a token that is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_moe import kernels


@dataclass(frozen=True)
class Ragged:
    """Which of B x S places hold tokens.

    ``place_T``: (T,) int64, the places of the tokens among the B * S, rising. ``start_B``: the row of each
    sequence's first token. ``real_BS``: whether a place holds a token.
    """

    place_T: Tensor
    start_B: Tensor
    real_BS: Tensor

    @classmethod
    def of(cls, length_B: Tensor, most: int) -> Ragged:
        """For sequences of ``length_B`` tokens each, the first of ``most`` places. Waits for the device once: for T.

        Raises ValueError for a length that does not lie in 1..most (on an accelerator an error without words).
        """
        fits_B = (length_B >= 1) & (length_B <= most)
        if kernels.on_device_path(length_B):
            torch._assert_async(fits_B.all())
        elif not fits_B.all():
            raise ValueError(f"lengths must lie in 1..{most}, got {length_B[~fits_B].tolist()}")
        return cls.where(torch.arange(most, device=length_B.device) < length_B.unsqueeze(1))

    @classmethod
    def where(cls, real_BS: Tensor) -> Ragged:
        """For tokens at any places. Waits for the device once: for T."""
        length_B = real_BS.sum(1)
        return cls(real_BS.flatten().nonzero().squeeze(1), length_B.cumsum(0) - length_B, real_BS)

    @property
    def is_full(self) -> bool:
        """Whether there is no padding at all."""
        return self.place_T.numel() == self.real_BS.numel()

    @property
    def example_T(self) -> Tensor:
        """(T,) int64: the sequence that each token belongs to."""
        return torch.div(self.place_T, max(self.real_BS.shape[1], 1), rounding_mode="floor")

    @property
    def position_T(self) -> Tensor:
        """(T,) int64: its position there."""
        return self.place_T % max(self.real_BS.shape[1], 1)

    def tokens_of(self, x_BS: Tensor) -> Tensor:
        """(B, S, ...) -> (T, ...): what stands at the real places."""
        rows = x_BS.flatten(0, 1)
        return rows if self.is_full else rows.index_select(0, self.place_T)

    def padded(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (B, S, D), 0 where there is no token."""
        if not self.is_full:
            zeros = x_TD.new_zeros(self.real_BS.numel(), x_TD.shape[1])
            x_TD = zeros.index_copy(0, self.place_T, x_TD)
        return x_TD.view(*self.real_BS.shape, x_TD.shape[1])
