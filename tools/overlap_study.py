"""The exchange in chunks against the flat one: the time of a step over a slow link, and within one machine.

    python tools/overlap_study.py --report results/overlap.md        # as root, on Linux with iproute2

Two ranks, each a network namespace with a cable of limited rate (or both in this machine), run forward and backward of
one MoE layer, with 1, 2, 4 and 8 chunks in turn, on the same tokens; outputs must be equal to the bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from dist_moe.config.files import json_line, parse_json
from dist_moe.engine.launch.environment import LaunchEnvironment, disable_malloc_trim
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.experts import FeedForwardBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.parallel import FlatExchange, OverlappedExchange, World, experts_of_rank, gather_objects, wait_for_all
from tools.namespaces import cluster
from tools.ranks import run_ranks

RANKS, EXPERTS, K = 2, 16, 2
CHUNKS = (1, 2, 4, 8)
PORT = 29579
PATIENCE_S = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--rates", nargs="+", default=["300mbit", "1gbit", "none"], help="none: within one machine")
    parser.add_argument("--tokens", type=int, default=1024, help="of every rank")
    parser.add_argument("--width", type=int, default=256, help="of a token")
    parser.add_argument("--hidden", type=int, default=1024, help="units of an expert")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measured is not None:
        measured = measure(options)
        if os.environ["RANK"] == "0":
            options.measured.write_text(json_line(measured), encoding="utf-8")
        return
    page = table(options)
    print(page)
    if options.report is not None:
        options.report.write_text(page, encoding="utf-8")


def table(options: argparse.Namespace) -> str:
    """Markdown: by rate of the link and number of chunks, the time of a step over that of the flat exchange."""
    rows = [_row(rate, measured_over(rate, options)) for rate in options.rates]
    sizes = (
        f"--rates {' '.join(options.rates)} --tokens {options.tokens} --width {options.width} "
        f"--hidden {options.hidden} --repetitions {options.repetitions} --seed {options.seed}"
    )
    return "\n".join(
        [
            "# The exchange overlapped with the experts",
            "",
            f"`python tools/overlap_study.py {sizes}`: {RANKS} ranks of one thread, each in a network namespace of its "
            f"own behind a cable of the given rate (none: loopback), gloo; one MoE layer, {EXPERTS} feed-forward "
            f"experts of {options.hidden} units, Top-k gate with k = {K}, {options.tokens} tokens of width "
            f"{options.width} per rank, fp32, forward and backward. {os.cpu_count()} cores, torch "
            f"{torch.__version__.split('+')[0]}. Numbers of chunks alternate; a figure is the median over repetitions "
            "of the ratio to the flat exchange's step of the same repetition, with quartiles. Outputs are equal to "
            "the bit.",
            "",
            "| rate | share of the exchange in a flat step | " + " | ".join(f"{c} chunks" for c in CHUNKS[1:]) + " |",
            "| --- | --- |" + " --- |" * len(CHUNKS[1:]),
            *rows,
            "",
        ]
    )


def _row(rate: str, measured: dict[str, list[float]]) -> str:
    flat = measured["1"]
    share = np.median(np.divide(measured["exchange"], flat))
    cells = []
    for chunks in CHUNKS[1:]:
        low, middle, high = np.quantile(np.divide(measured[str(chunks)], flat), [0.25, 0.5, 0.75])
        cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
    return f"| {rate} | {share:.2f} | " + " | ".join(cells) + " |"


def measured_over(rate: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return what :func:`measure` gives on ranks behind such cables; without a cable, on one machine."""
    with tempfile.TemporaryDirectory() as directory:
        measured = Path(directory) / "measured.json"
        words = [sys.executable, *sys.argv, "--measured", str(measured)]
        if rate == "none":
            run_ranks(words, [None], RANKS, port=PORT, patience_s=PATIENCE_S)
        else:
            with cluster(RANKS, rate) as nodes:
                run_ranks(words, nodes, 1, port=PORT, patience_s=PATIENCE_S)
        seconds: dict[str, list[float]] = parse_json(measured.read_text(encoding="utf-8"))
    return seconds


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """On every rank: seconds of each repetition by number of chunks, and of the flat exchange without experts."""
    torch.set_num_threads(1)
    disable_malloc_trim()
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=RANKS)) as groups:
        layers, tokens = _layers(groups.world, options), _tokens(groups.world, options)
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        outputs: dict[str, Tensor] = {}
        for repetition in range(options.repetitions + 1):
            for name, layer in layers.items():
                wait_for_all()
                started = time.perf_counter()
                outputs[name] = step(layer, *tokens)
                wait_for_all()
                if repetition > 0:
                    seconds[name].append(max(gather_objects(time.perf_counter() - started)))
        if not all(outputs[str(chunks)].equal(outputs["1"]) for chunks in CHUNKS):
            raise SystemExit("the exchanges differ")
    return seconds


def _tokens(world: World, options: argparse.Namespace) -> list[Tensor]:
    generator = torch.Generator().manual_seed(options.seed * 1000 + world.rank)
    return [torch.randn(options.tokens, options.width, generator=generator) for _ in range(2)]


def _layers(world: World, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    gate = TopK(options.width, EXPERTS, K)
    bank = FeedForwardBank(options.width, options.hidden, EXPERTS, experts_of_rank(EXPERTS, world))
    layers: dict[str, Any] = {}
    for chunks in CHUNKS:
        exchange = FlatExchange(world) if chunks == 1 else OverlappedExchange(world, chunks)
        layers[str(chunks)] = MoE(gate, bank, world=world, exchange=exchange)
    layers["exchange"] = _WithoutExperts(layers["1"])
    return layers


class _WithoutExperts:
    """The layer's gate and flat exchange around experts that give back what they get."""

    def __init__(self, layer: MoE) -> None:
        self._layer = layer

    def zero_grad(self) -> None:
        self._layer.zero_grad()

    def __call__(self, x_TD: Tensor) -> Any:
        experts, self._layer.experts = self._layer.experts, _Nothing(self._layer.experts)  # type: ignore[assignment]
        try:
            return self._layer(x_TD)
        finally:
            self._layer.experts = experts


class _Nothing(torch.nn.Module):
    def __init__(self, bank: FeedForwardBank) -> None:
        super().__init__()
        self.num_experts = bank.num_experts

    def forward(self, x_ND: Tensor, rows_per_expert: list[int]) -> Tensor:
        return x_ND


def step(layer: Any, x_TD: Tensor, cotangent_TF: Tensor) -> Tensor:
    """Forward and backward; the outputs."""
    layer.zero_grad()
    x_TD = x_TD.clone().requires_grad_()
    output_TF: Tensor = layer(x_TD).outputs[0]
    (output_TF * cotangent_TF).sum().backward()
    return output_TF.detach()


if __name__ == "__main__":
    main()
