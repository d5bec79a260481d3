"""Statistics of a layer against a loop over tokens and experts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_moe.experts import FeedForwardBank
from dist_moe.gates import CometConfig, Gate, GateContext, NullSlots, ReLU, SMoEDropout, Softmax, TopK
from dist_moe.layer import MoE
from dist_moe.recipes.merge_compress import calibrate
from dist_moe.recipes.merge_compress.calibrate import LayerSums
from dist_moe.search import SlotTable
from tests.experts.naive_banks import naive_expert
from tests.helpers.oracle import naive_gate

EXPERTS, SLOTS, DIM = 3, 5, 4
TABLE = [2, 0, 1, 0, 2]
GATES: dict[str, Callable[[], Gate]] = {
    "top_k": lambda: TopK(DIM, SLOTS, scores="softmax_before"),
    "softmax": lambda: Softmax(DIM, SLOTS),
    "relu": lambda: ReLU(DIM, SLOTS),
    "smoe_dropout": lambda: SMoEDropout(DIM, SLOTS, 2, 3, 10),
    "ada_moe": lambda: NullSlots(TopK(DIM, SLOTS + 3, 3), 3),
    "comet": lambda: CometConfig(k=2, gamma=1.0).build(DIM, SLOTS, GateContext()),
}


def build(gate: str, num_gates: int) -> MoE:
    """Top-k's weights do not sum to 1."""
    torch.manual_seed(4)
    gates = [GATES[gate]() for _ in range(num_gates)]
    table = SlotTable(EXPERTS, num_gates, num_slots=SLOTS)
    table.table.copy_(torch.tensor(TABLE))
    return MoE(gates, FeedForwardBank(DIM, 6, EXPERTS, range(EXPERTS)), table).double().eval()


def cosine(a: list[float] | Tensor, b: list[float] | Tensor) -> float:
    one, other = (np.asarray(torch.as_tensor(x).detach(), dtype=np.float64).ravel() for x in (a, b))
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("num_gates", [1, 2])
@torch.no_grad()
def test_statistics_equal_a_loop(gate: str, num_gates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens come in batches of several sizes, one of them empty, and their results are looked at in parts."""
    monkeypatch.setattr(calibrate, "_NUMBERS_AT_ONCE", 1024 * EXPERTS * DIM // 3)
    layer, x_TD = build(gate, num_gates), torch.randn(11, DIM, dtype=torch.float64)
    sums = LayerSums(layer, outputs=True)
    layer.register_forward_hook(sums.see)
    seen_at_once, all_results = [], layer.all_results
    monkeypatch.setattr(layer, "all_results", lambda x: seen_at_once.append(len(x)) or all_results(x))
    for part in x_TD.split([4, 0, 6, 1]):
        layer(part)
    assert len(seen_at_once) == 4 * 3, "on every rank as many, whatever tokens it has"
    assert max(seen_at_once) == 2
    seen = sums.statistics()
    count, reap = [0] * EXPERTS, [0.0] * EXPERTS
    column: list[list[float]] = [[] for _ in range(EXPERTS)]
    result_ETF = torch.stack([torch.stack([naive_expert(layer.experts, e, x) for x in x_TD]) for e in range(EXPERTS)])
    for each in layer.each_gate:
        mixture_TS, _ = naive_gate(each, x_TD)
        for t, x_D in enumerate(x_TD):
            score_S = mixture_TS[t]
            if isinstance(each, TopK | Softmax | SMoEDropout):
                assert each.bias is not None
                score_S = torch.stack([each.weight[s] @ x_D + each.bias[s] for s in range(SLOTS)])
            elif isinstance(each, ReLU):
                score_S = torch.stack([each.weight[s] @ x_D for s in range(SLOTS)])
            elif isinstance(each, NullSlots):
                assert isinstance(each.gate, TopK)
                assert each.gate.bias is not None
                score_S = torch.stack([each.gate.weight[s] @ x_D + each.gate.bias[s] for s in range(SLOTS)])
            for e in range(EXPERTS):
                mine = [s for s in range(SLOTS) if TABLE[s] == e]
                column[e].append(float(sum(score_S[s] for s in mine)))
                weight = float(sum(mixture_TS[t, s] for s in mine))
                if weight:
                    count[e] += 1
                    reap[e] += weight / float(mixture_TS[t].sum()) * float(result_ETF[e, t].norm())
    every = range(EXPERTS)
    assert seen.usage_E == pytest.approx([c / sum(count) for c in count])
    assert seen.router_EE == pytest.approx(np.array([[cosine(column[a], column[b]) for b in every] for a in every]))
    assert seen.output_EF == pytest.approx(result_ETF.mean(dim=1).numpy())
    if gate == "comet":
        assert seen.rows_EE is None
    else:
        weights = [each.gate.weight if isinstance(each, NullSlots) else each.weight for each in layer.each_gate]
        row = [torch.cat([sum(w[s] for s in range(SLOTS) if TABLE[s] == e) for w in weights]) for e in every]
        assert seen.rows_EE == pytest.approx(np.array([[cosine(row[a], row[b]) for b in every] for a in every]))
    of_outputs = [[cosine(result_ETF[a], result_ETF[b]) for b in every] for a in every]
    assert seen.output_EE == pytest.approx(np.array(of_outputs))
    assert seen.reap_E == pytest.approx([r / c for r, c in zip(reap, count, strict=True)])


@torch.no_grad()
def test_excluded_slots_say_nothing_of_experts() -> None:
    layer = build("top_k", 1)
    layer.each_gate[0].allow(torch.tensor([True, True, False, True, True]))  # the only slot of expert 1
    sums = LayerSums(layer, outputs=False)
    layer.register_forward_hook(sums.see)
    layer(torch.randn(8, DIM, dtype=torch.float64))
    seen = sums.statistics()
    assert seen.usage_E[1] == 0
    assert seen.router_EE[1].tolist() == [0, 0, 0]
    assert seen.rows_EE is not None
    assert seen.rows_EE[1].tolist() == [0, 0, 0]
    assert np.isfinite(seen.router_EE).all()
