"""Which rows a token has, found once by a stable sort and used by every pass over the rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_moe.kernels.device_path import on_device_path, start_of_each


class TokenIndex(NamedTuple):
    """``token_N`` (N,): the token of each row. ``row_N`` (N,): the rows sorted by token, stably. ``start_T1``
    (T + 1,): the place in ``row_N`` where each token's begin; then N."""

    token_N: Tensor
    row_N: Tensor
    start_T1: Tensor

    @classmethod
    def of(cls, token_N: Tensor, num_tokens: int) -> TokenIndex:
        """Sort rows of the tokens ``token_N``, each in 0..num_tokens-1, which come in any order."""
        row_N = stable_order(token_N, num_tokens)
        return cls(token_N, row_N, start_of_each(token_N[row_N], num_tokens))

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.start_T1.shape[0] - 1


def stable_order(key_N: Tensor, bound: int) -> Tensor:
    """Return the order that sorts ``key_N``, integers in 0..bound-1, stably."""
    if on_device_path(key_N) or bound > 2**16:
        return key_N.argsort(stable=True)
    return torch.from_numpy(np.argsort(key_N.numpy().astype(np.uint16), kind="stable"))  # a radix sort
