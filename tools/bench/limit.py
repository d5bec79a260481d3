"""The limit: nothing but the matrix products that the mathematics needs, into memory allocated before.

For an expert with n rows, D the width, F the hidden width: three products forward, six backward, 2 n D F each;
and the router's three, 2 T D E each. No activation, no gathering, no sum. They are run in several ways, and the
fastest is the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dist_moe.kernels.across_cores import across_cores
from tools.bench.timing import Clock, interleaved
from tools.bench.workloads import Material, Workload

Way = Callable[[], None]


class Products:
    """The products of this rank's experts on ``rows_per_expert`` rows, on weights ``here`` of the material."""

    def __init__(self, workload: Workload, given: Material, rows_per_expert: list[int], here: slice) -> None:
        dtype = workload.torch_dtype
        self.rows, self.ends = rows_per_expert, list(accumulate(rows_per_expert))
        self.x_TD, self.router_DE = given.x_TD, given.router_ED.T
        self.gate, self.up, self.down = (w[here] for w in (given.gate_EDF, given.up_EDF, given.down_EFD))
        self.both = torch.cat([self.gate, self.up], dim=2)
        rows, width, hidden = sum(rows_per_expert), workload.width, workload.hidden
        self.rows_ND, self.grad_ND = (torch.randn(rows, width).to(dtype) for _ in range(2))
        self.active_NF, self.grad_up_NF, self.grad_gate_NF = (torch.randn(rows, hidden).to(dtype) for _ in range(3))
        self.grad_both_NF = torch.randn(rows, 2 * hidden).to(dtype)
        self.out_ND, self.out_NF, self.out_both_NF = (
            torch.empty_like(t) for t in (self.rows_ND, self.active_NF, self.grad_both_NF)
        )
        self.grad_weight = torch.empty_like(self.gate)
        self.grad_both = torch.empty_like(self.both)
        self.grad_down = torch.empty_like(self.down)
        self.logit_TE = torch.randn(len(self.x_TD), workload.experts).to(dtype)
        self.out_logit_TE, self.out_TD = torch.empty_like(self.logit_TE), torch.empty_like(self.x_TD)
        self.grad_router_DE = torch.empty_like(self.router_DE)

    def ways(self) -> dict[str, Way]:
        """By name."""
        ways: dict[str, Way] = {
            "loop": lambda: self._with_router(self._loop(self._expert)),
            "loop, gate and up in one": lambda: self._with_router(self._loop(self._expert_in_one)),
            "spread over the cores": lambda: self._with_router(self._spread(self._expert)),
            "spread over the cores, gate and up in one": lambda: self._with_router(self._spread(self._expert_in_one)),
        }
        if len(set(self.rows)) == 1 and self.rows[0] > 0:
            ways["bmm"] = lambda: self._with_router(self._batched)
        return ways

    def _with_router(self, experts: Way) -> None:
        torch.mm(self.x_TD, self.router_DE, out=self.out_logit_TE)
        experts()
        torch.mm(self.logit_TE, self.router_DE.T, out=self.out_TD)
        torch.mm(self.x_TD.T, self.logit_TE, out=self.grad_router_DE)

    def _loop(self, expert: Callable[[int], None]) -> Way:
        def all_experts() -> None:
            for e in range(len(self.rows)):
                expert(e)

        return all_experts

    def _spread(self, expert: Callable[[int], None]) -> Way:
        work = 9 * self.gate[0].numel()

        def task(e: int, _: Tensor) -> None:
            expert(e)

        return lambda: across_cores(task, self.rows, work, self.rows_ND)

    def _expert(self, e: int) -> None:
        n = self._of(e)
        torch.mm(self.rows_ND[n], self.gate[e], out=self.out_NF[n])
        torch.mm(self.rows_ND[n], self.up[e], out=self.out_NF[n])
        self._down(e, n)
        torch.mm(self.grad_up_NF[n], self.up[e].T, out=self.out_ND[n])
        torch.addmm(self.out_ND[n], self.grad_gate_NF[n], self.gate[e].T, out=self.out_ND[n])
        torch.mm(self.rows_ND[n].T, self.grad_up_NF[n], out=self.grad_weight[e])
        torch.mm(self.rows_ND[n].T, self.grad_gate_NF[n], out=self.grad_weight[e])

    def _expert_in_one(self, e: int) -> None:
        n = self._of(e)
        torch.mm(self.rows_ND[n], self.both[e], out=self.out_both_NF[n])
        self._down(e, n)
        torch.mm(self.grad_both_NF[n], self.both[e].T, out=self.out_ND[n])
        torch.mm(self.rows_ND[n].T, self.grad_both_NF[n], out=self.grad_both[e])

    def _down(self, e: int, n: slice) -> None:
        torch.mm(self.active_NF[n], self.down[e], out=self.out_ND[n])
        torch.mm(self.grad_ND[n], self.down[e].T, out=self.out_NF[n])
        torch.mm(self.active_NF[n].T, self.grad_ND[n], out=self.grad_down[e])

    def _batched(self) -> None:
        experts = len(self.rows)
        x, grad, out = (t.view(experts, -1, t.shape[1]) for t in (self.rows_ND, self.grad_ND, self.out_ND))
        active, grad_up, grad_gate, out_F = (
            t.view(experts, -1, t.shape[1]) for t in (self.active_NF, self.grad_up_NF, self.grad_gate_NF, self.out_NF)
        )
        torch.bmm(x, self.gate, out=out_F)
        torch.bmm(x, self.up, out=out_F)
        torch.bmm(active, self.down, out=out)
        torch.bmm(grad, self.down.mT, out=out_F)
        torch.bmm(active.mT, grad, out=self.grad_down)
        torch.bmm(grad_up, self.up.mT, out=out)
        torch.baddbmm(out, grad_gate, self.gate.mT, out=out)
        torch.bmm(x.mT, grad_up, out=self.grad_weight)
        torch.bmm(x.mT, grad_gate, out=self.grad_weight)

    def _of(self, e: int) -> slice:
        return slice(self.ends[e] - self.rows[e], self.ends[e])


@dataclass(frozen=True)
class Needed:
    """``flops`` of the products, and ``bytes`` that they must at least read and write: every operand once forward and
    once backward, every result once."""

    flops: float
    bytes: float

    @classmethod
    def of(cls, workload: Workload, rows: int, tokens: int, local_experts: int) -> Needed:
        """On one rank that computes ``rows`` rows of ``local_experts`` experts, for ``tokens`` tokens."""
        w, size = workload, workload.torch_dtype.itemsize
        of_weights = 3 * local_experts * w.width * w.hidden
        flops = 18.0 * rows * w.width * w.hidden + 6.0 * tokens * w.width * w.experts
        forward = of_weights + rows * (2 * w.width + 3 * w.hidden)
        backward = 2 * of_weights + rows * (3 * w.width + 6 * w.hidden)
        router = 3 * w.experts * w.width + 4 * tokens * w.width + 2 * tokens * w.experts
        return cls(flops, float(size * (forward + backward + router)))


@dataclass(frozen=True)
class Roof:
    """Rates that this machine reaches: FLOP/s of a large product, bytes/s of a large copy (read and written)."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, needed: Needed) -> float:
        """The roofline: arithmetic and memory traffic perfectly overlapped."""
        return max(needed.flops / self.flops_per_s, needed.bytes / self.bytes_per_s)


def measure_roof(dtype: torch.dtype, clock: Clock = "wall", repetitions: int = 4, size: int = 1024) -> Roof:
    """The best of ``repetitions``, with the threads that the process has."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    product, source = torch.empty_like(a), torch.randn(2**24)
    target = torch.empty_like(source)
    seconds = interleaved(
        {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}, repetitions, clock=clock
    )
    return Roof(2 * size**3 / min(seconds["product"]), 2 * source.numel() * 4 / min(seconds["copy"]))
