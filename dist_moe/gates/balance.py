"""The load-balance loss of softmax routers, with AdaMoE's bucket of null slots.

Fedus, Zoph, Shazeer: Switch Transformers (JMLR 2022), eq. 4-6. With S slots (excluded ones do not count), f_i
the share of all selections that slot i gets and P_i the mean over tokens of its router probability:

    L = S sum_i f_i P_i                                   1 when routing is uniform

Zeng, Miao, Gao, Zhang, Deng: AdaMoE (Findings of EMNLP 2024): it does not matter which null slot a
token takes, so every null slot counts with the mean f over the null slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_moe.gates.base import Gate


def load_balance(gate: Gate, selected_TS: Tensor, probability_TS: Tensor, num_null: int = 0) -> Tensor:
    """Return L over the tokens of all ranks; 0 without any token.

    ``selected_TS`` (T, S) bool: which slots each token of this rank takes. ``probability_TS``: its
    router probabilities, through which alone the gradient flows. The last ``num_null`` slots are
    the nulls. ``gate``: whose :meth:`~dist_moe.gates.base.Gate.total` sums over the ranks.
    """
    sums_2S = torch.stack([selected_TS.to(probability_TS.dtype).sum(0), probability_TS.sum(0)])
    totals_2S, num_tokens = gate.total(sums_2S, len(probability_TS))
    count_S, mean_S = totals_2S[0], totals_2S[1] / num_tokens.clamp(min=1)
    share_S = count_S / count_S.sum().clamp(min=1)
    if num_null:
        true_S, null_S = share_S[:-num_null], share_S[-num_null:]
        share_S = torch.cat([true_S, null_S.mean().expand(num_null)])
    excluded = 0 if gate.allowed_E is None else (~gate.allowed_E).sum()
    return (share_S.numel() - excluded) * (share_S * mean_S).sum()
