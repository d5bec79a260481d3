"""Models of all ranks beside the model of one process: what each rank has, and gradients put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def joined(of_ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients of the ranks as those of one process: of experts one after another, of all else their sum."""
    return {
        name: torch.cat([one[name] for one in of_ranks]) if ".experts." in name else sum(one[name] for one in of_ranks)
        for name in of_ranks[0]
    }


def assert_shares(of_ranks: Sequence[nn.Module], whole: nn.Module) -> None:
    """Replicated parameters are equal to the bit, and experts are the ones of their ids."""
    for name, parameter in whole.named_parameters():
        parts = [share.get_parameter(name) for share in of_ranks]
        if ".experts." in name:
            assert torch.equal(torch.cat(parts), parameter), name
        else:
            assert all(torch.equal(part, parameter) for part in parts), name
