"""The exchange against the wire: dispatch and combine, forward and backward, over raw all-to-alls of the same bytes.

    python tools/bench/exchange.py --report results/bench_exchange.md

Every rank is a gloo process of one thread. The measured alternate, repetition by repetition, behind a barrier: four
bare ``all_to_all_single`` between buffers that exist already; the flat exchange's dispatch and combine of the same
rows, with the exchange of the counts, the regrouping and autograd; and the counts and the regrouping alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist  # noqa: TID251  (the bare wire)
from torch import multiprocessing

from dist_moe.engine.host_memory import keep_freed_memory
from dist_moe.parallel import DispatchPlan, ProcessWorld, combine, dispatch, plan_dispatch
from dist_moe.parallel.dispatch import regrouped

HEADER = (
    "| ranks | MB sent per rank and all-to-all | exchange / raw (quartiles) | counts / raw | regrouping / raw |",
    "| --- | --- | --- | --- | --- |",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=2048, help="of every rank")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--k", type=int, default=2, help="experts per token, drawn evenly")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    page = table(options)
    print(page)
    if options.report is not None:
        options.report.write_text(page)


def table(options: argparse.Namespace) -> str:
    """Markdown: the ratios of each number of ranks, and what was run."""
    command = (
        f"`python tools/bench/exchange.py --tokens {options.tokens} --width {options.width} "
        f"--experts {options.experts} --k {options.k} --repetitions {options.repetitions} --seed {options.seed}`"
    )
    rows = [_row(size, _measured_by(size, options), options) for size in options.ranks]
    about = (
        f"{command}: fp32, gloo over the loopback, one thread a rank, {os.cpu_count()} cores, torch "
        f"{torch.__version__.split('+')[0]}. Medians of ratios of neighbouring measurements; raw: four all-to-alls "
        "into buffers that exist, which is what dispatch and combine send, forward and backward."
    )
    return "\n".join(["# The exchange over the wire", "", about, "", *HEADER, *rows, ""])


def _row(size: int, seconds: dict[str, list[float]], options: argparse.Namespace) -> str:
    ratios = {name: np.divide(of_part, seconds["raw"]) for name, of_part in seconds.items()}
    low, middle, high = np.quantile(ratios["exchange"], [0.25, 0.5, 0.75])
    megabytes = options.tokens * options.k * options.width * 4 / 1e6 * (size - 1) / size
    parts = " | ".join(f"{np.median(ratios[name]):.3f}" for name in ("counts", "regrouping"))
    return f"| {size} | {megabytes:.1f} | {middle:.2f} ({low:.2f}-{high:.2f}) | {parts} |"


def _measured_by(size: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """By what is measured, the seconds of every repetition on rank 0."""
    with tempfile.TemporaryDirectory() as directory:
        measured = Path(directory) / "measured.pt"
        multiprocessing.spawn(_measure, (size, directory, options, measured), nprocs=size)
        seconds: dict[str, list[float]] = torch.load(measured)
    return seconds


def _measure(rank: int, size: int, directory: str, options: argparse.Namespace, measured: Path) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as every training run does
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    parts = _parts(ProcessWorld(dist.group.WORLD), options)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repetition in range(options.repetitions + 2):
        for name, part in parts.items():
            dist.barrier()
            started = time.perf_counter()
            part()
            dist.barrier()
            if repetition >= 2:
                seconds[name].append(time.perf_counter() - started)
    if rank == 0:
        torch.save(seconds, measured)
    dist.destroy_process_group()


def _parts(world: ProcessWorld, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(options.seed * 1000 + world.rank)
    chosen = torch.rand(options.tokens, options.experts, generator=generator).topk(options.k, dim=1).indices
    rows_per_expert_E = torch.bincount(chosen.flatten(), minlength=options.experts)
    x_ND, cotangent_ND = (torch.randn(chosen.numel(), options.width, generator=generator) for _ in range(2))
    plan = plan_dispatch(rows_per_expert_E, world)
    there_ND, back_ND = torch.empty(sum(plan.receive_rows), options.width), torch.empty_like(x_ND)

    def raw() -> None:
        for _ in ("forward", "backward"):
            dist.all_to_all_single(there_ND, x_ND, plan.receive_rows, plan.send_rows)
            dist.all_to_all_single(back_ND, there_ND, plan.send_rows, plan.receive_rows)

    def exchange() -> None:
        learning_ND = x_ND.detach().requires_grad_()
        fresh: DispatchPlan = plan_dispatch(rows_per_expert_E, world)
        torch.autograd.grad(combine(dispatch(learning_ND, fresh, world), fresh, world), learning_ND, cotangent_ND)

    def regrouping() -> None:
        for _ in range(4):
            regrouped(there_ND, plan.received_RL)

    return {
        "raw": raw,
        "exchange": exchange,
        "counts": lambda: plan_dispatch(rows_per_expert_E, world),
        "regrouping": regrouping,
    }


if __name__ == "__main__":
    main()
