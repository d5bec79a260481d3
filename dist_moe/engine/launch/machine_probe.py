"""The rates of this machine, measured: products, moves in memory, fixed times, and collectives between ranks.

Nothing here knows a configuration: sizes are fixed, and what is measured is what the layer does, piece by piece.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.process_groups import ProcessGroups
from dist_moe.experts import DenseReLUBank
from dist_moe.gates import TopK
from dist_moe.kernels import TokenIndex, grouped_linear, rows_of_tokens, weighted_scatter
from dist_moe.layer import MoE
from dist_moe.parallel import ProcessWorld

ROWS = (4, 16, 64, 256, 1024)
WIDTH = 256
REPETITIONS = 7
_MOVED_ROWS = 8192
_LARGE_BYTES = 8 * 2**20
_EXPERTS = 8
_TOKENS = 4


@dataclass(frozen=True)
class LocalRates:
    """Rates of one rank, while other ranks measure the same: the fields of that name of the planner's machine."""

    gemm_flop_per_s_by_rows: dict[int, float]
    elementwise_bytes_per_s: float
    index_bytes_per_s: float
    scatter_bytes_per_s: float
    combine_bytes_per_s: float
    sort_keys_per_s: float
    layer_fixed_s: float
    step_fixed_s: float = 0.0


@dataclass(frozen=True)
class LinkRates:
    """Rates between ranks: bytes per second that leave a rank; seconds per peer of a collective of 8 bytes."""

    all_to_all_bytes_per_s: float
    all_reduce_bytes_per_s: float
    latency_s: float


def local_rates(device: torch.device) -> LocalRates:
    """Return this rank's rates. Takes some seconds on a CPU core; issues no collective."""
    x, order = torch.randn(_MOVED_ROWS, WIDTH, device=device), torch.randperm(_MOVED_ROWS, device=device)
    token_N = torch.randint(_MOVED_ROWS // 2, (_MOVED_ROWS,), device=device)
    size = x.numel() * x.element_size()
    token_index = TokenIndex.of(token_N, _MOVED_ROWS // 2)
    tokens_TD = x[: _MOVED_ROWS // 2].clone().requires_grad_()
    gathered = rows_of_tokens(tokens_TD, token_index)
    keys = torch.randint(2**40, (_MOVED_ROWS,), device=device)
    weight_GN = torch.rand(2, _MOVED_ROWS, device=device)
    layer, few_TD = _SmallModel(device).moe, torch.randn(_TOKENS, 8, device=device, requires_grad=True)

    def index() -> None:
        x.index_select(0, token_N)
        torch.empty_like(x).index_copy(0, order, x)

    def scatter() -> None:
        torch.autograd.grad(gathered, tokens_TD, x, retain_graph=True)

    def combine() -> None:
        rows = x.clone().requires_grad_()
        weighted_scatter(rows, weight_GN, token_index).sum().backward()

    def elementwise() -> None:
        torch.relu(x) * x

    return LocalRates(
        gemm_flop_per_s_by_rows={rows: _product_rate(rows, device) for rows in ROWS},
        elementwise_bytes_per_s=5 * size / median_seconds(elementwise, device),
        index_bytes_per_s=4 * size / median_seconds(index, device),
        scatter_bytes_per_s=3 * size / median_seconds(scatter, device),
        combine_bytes_per_s=2 * size / median_seconds(combine, device),
        sort_keys_per_s=_MOVED_ROWS / median_seconds(lambda: torch.unique(keys, return_inverse=True), device),
        layer_fixed_s=median_seconds(lambda: layer(few_TD).outputs[0].sum().backward(), device),
    )


def _product_rate(rows: int, device: torch.device) -> float:
    """Return the rate of a grouped linear layer, forward and backward, each group with rows and a weight of its own."""
    weight_EDF = torch.randn(_EXPERTS, WIDTH, WIDTH, device=device, requires_grad=True)
    bias_EF = torch.zeros(_EXPERTS, WIDTH, device=device, requires_grad=True)
    x_ND = torch.randn(_EXPERTS * rows, WIDTH, device=device, requires_grad=True)
    grad_NF = torch.randn(_EXPERTS * rows, WIDTH, device=device)

    def products() -> None:
        y_NF = grouped_linear(x_ND, weight_EDF, bias_EF, [rows] * _EXPERTS)
        torch.autograd.grad(y_NF, (x_ND, weight_EDF, bias_EF), grad_NF)

    return 6.0 * _EXPERTS * rows * WIDTH**2 / median_seconds(products, device)


class _SmallModel(nn.Module):
    """A layer and a head, with hardly any number in them: what is left of a step is what it costs in any case."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.moe = MoE(TopK(8, _EXPERTS, 2), DenseReLUBank(8, 8, _EXPERTS, range(_EXPERTS))).to(device)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)).to(device)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return a number that depends on all parameters."""
        return self.head(self.moe(x_TD).outputs[0]).sum()


def step_fixed_seconds(groups: ProcessGroups) -> float:
    """Return the seconds of a training step of hardly any token at ZeRO stage 1. Collective over all ranks."""
    ranks = groups.environment.world_size
    section = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 1}}
    engine = ExpertParallelEngine(
        _SmallModel(groups.device), complete_deepspeed_section(section, ranks * _TOKENS, ranks), groups
    )
    x_TD = torch.randn(_TOKENS, 8, device=groups.device)

    def step() -> None:
        engine.backward(engine(x_TD))
        engine.step()

    try:
        return median_seconds(step, groups.device)
    finally:
        engine.destroy()


def link_rates(group: dist.ProcessGroup, device: torch.device) -> LinkRates:
    """Return the rates between the at least two ranks of ``group``. Collective over them."""
    world = ProcessWorld(group)
    peers = world.size - 1
    share = _LARGE_BYTES // (4 * peers)
    large, tiny = (torch.zeros(number * world.size, 1, device=device) for number in (share, 1))

    def exchange(x: Tensor) -> Callable[[], Tensor]:
        rows = [len(x) // world.size] * world.size
        return lambda: world.exchange(x, rows, rows)

    latency = median_seconds(exchange(tiny), device, REPETITIONS * 4)
    to_all = median_seconds(exchange(large), device) - latency
    reduced = torch.zeros(_LARGE_BYTES // 4, device=device)
    reduce = median_seconds(lambda: dist.all_reduce(reduced, group=group), device) - latency
    ring = 2 * _LARGE_BYTES * peers / world.size
    return LinkRates(4 * share * peers / max(to_all, 1e-9), ring / max(reduce, 1e-9), latency / peers)


def open_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup | None:
    """Return a process group of ``ranks``; None on others. Collective over all ranks of the job."""
    group = dist.new_group(list(ranks), timeout=timeout)
    return group if dist.get_rank() in ranks else None


def mean_rates(measured: Sequence[LocalRates]) -> LocalRates:
    """Return the mean rates of several ranks."""

    def mean(name: str) -> float:
        return statistics.fmean(getattr(rates, name) for rates in measured)

    names = [name for name in LocalRates.__dataclass_fields__ if name != "gemm_flop_per_s_by_rows"]
    gemm = {rows: statistics.fmean(r.gemm_flop_per_s_by_rows[rows] for r in measured) for rows in ROWS}
    return replace(measured[0], gemm_flop_per_s_by_rows=gemm, **{name: mean(name) for name in names})


def median_seconds(function: Callable[[], object], device: torch.device, repetitions: int = REPETITIONS) -> float:
    """Return the median wall-clock time of a call, after two that do not count."""
    seconds = []
    for repetition in range(repetitions + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repetition > 1:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
