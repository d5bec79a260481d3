"""The flat and the two-level exchange over a slow link: bytes that cross it, and the time of a step.

    python tools/two_level_study.py --report results/two_level.md        # as root, on Linux with iproute2

Two network namespaces play two nodes of two ranks each, whose cables to a switch tbf limits to 1 Gbit/s.
For k = 2, 4 and 8 experts per token each exchange runs forward and backward of one MoE layer, alternately, on
the same tokens; results and gradients must agree. Namespaces are removed at the end, however it comes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from dist_moe.config.files import json_line, parse_json
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.engine.launch.process_groups import ParallelConfig, process_groups
from dist_moe.experts import DenseReLUBank
from dist_moe.gates import TopK
from dist_moe.layer import MoE
from dist_moe.parallel import FlatExchange, World, experts_of_rank, gather_objects, two_level_exchange, wait_for_all
from tools.namespaces import cluster
from tools.ranks import run_ranks

NODES, RANKS_PER_NODE, EXPERTS = 2, 2, 16
TOP_K = (2, 4, 8)
EXCHANGES = ("flat", "two_level")
RATE = "1gbit"
PORT = 29577
LARGEST_DIFFERENCE = 1e-5
PATIENCE_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("results/two_level.md"))
    parser.add_argument("--tokens", type=int, default=2048, help="of every rank")
    parser.add_argument("--width", type=int, default=256, help="of a token, and of an expert's result")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measured is not None:
        measured = measure(options)
        if os.environ["RANK"] == "0":
            options.measured.write_text(json_line(measured), encoding="utf-8")
        return
    signal.signal(signal.SIGTERM, _leave)
    with tempfile.TemporaryDirectory() as directory, cluster(NODES, RATE) as nodes:
        path = Path(directory) / "measured.json"
        words = [sys.executable, *sys.argv, "--measured", str(path)]
        run_ranks(words, nodes, RANKS_PER_NODE, port=PORT, patience_s=PATIENCE_S)
        measured = parse_json(path.read_text(encoding="utf-8"))
    options.report.parent.mkdir(exist_ok=True)
    options.report.write_text(page(measured, options), encoding="utf-8")
    print(options.report.read_text(encoding="utf-8"))


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """On every rank: what :func:`measure_k` gives, for each k."""
    config = ParallelConfig(expert_parallel_size=NODES * RANKS_PER_NODE)
    with process_groups(LaunchEnvironment.read(), config) as groups:
        return [measure_k(k, groups.world, options) for k in TOP_K]


def measure_k(k: int, world: World, options: argparse.Namespace) -> dict[str, Any]:
    """By exchange: seconds of every step; bytes of a step per node, as counted and as the link saw them."""
    layers = layers_by_exchange(k, world, options)
    generator = torch.Generator().manual_seed(options.seed * 1000 + world.rank)
    x_TD, cotangent_TF = (torch.randn(options.tokens, options.width, generator=generator) for _ in range(2))
    results: dict[str, list[Tensor]] = {}
    measured = {name: {"seconds": [], "counted": [], "on_the_link": []} for name in EXCHANGES}
    for repetition in range(options.repetitions + 1):
        for name in EXCHANGES if repetition % 2 else EXCHANGES[::-1]:
            world.traffic.reset()
            wait_for_all()
            sent, started = bytes_sent(), time.perf_counter()
            results[name] = step(layers[name], x_TD, cotangent_TF)
            wait_for_all()
            seconds, sent = time.perf_counter() - started, bytes_sent() - sent
            numbers = gather_objects((seconds, world.traffic.bytes_across_nodes, sent / RANKS_PER_NODE))
            if repetition > 0:
                for figure, of_ranks in zip(measured[name].values(), zip(*numbers, strict=True), strict=True):
                    figure.append(max(of_ranks) if figure is measured[name]["seconds"] else sum(of_ranks) / NODES)
    differences = gather_objects(largest_difference(results["flat"], results["two_level"]))
    if max(differences) > LARGEST_DIFFERENCE:
        raise SystemExit(f"the exchanges differ by {max(differences)}")
    return {"k": k, "difference": max(differences)} | measured


def layers_by_exchange(k: int, world: World, options: argparse.Namespace) -> dict[str, MoE]:
    torch.manual_seed(options.seed)
    gate = TopK(options.width, EXPERTS, k)
    bank = DenseReLUBank(options.width, options.width, EXPERTS, experts_of_rank(EXPERTS, world))
    assert world.levels is not None, "the launcher's environment tells of two nodes of two ranks"
    exchanges = {"flat": FlatExchange(world), "two_level": two_level_exchange(world.levels)}
    return {name: MoE(gate, bank, world=world, exchange=exchange) for name, exchange in exchanges.items()}


def step(layer: MoE, x_TD: Tensor, cotangent_TF: Tensor) -> list[Tensor]:
    """Forward and backward: the outputs, and the gradients of tokens, gate and experts."""
    layer.zero_grad()
    x_TD = x_TD.clone().requires_grad_()
    output_TF = layer(x_TD).outputs[0]
    (output_TF * cotangent_TF).sum().backward()
    grads = [leaf.grad for leaf in (x_TD, *layer.parameters()) if leaf.grad is not None]
    return [output_TF.detach(), *(grad.clone() for grad in grads)]


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Relative to the largest number of each tensor."""
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(one, other, strict=True))


def bytes_sent() -> int:
    """By this node, since its link exists: headers and acknowledgements included."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text(encoding="utf-8"))


def page(measured: list[dict[str, Any]], options: argparse.Namespace) -> str:
    sizes = f"--tokens {options.tokens} --width {options.width} --repetitions {options.repetitions}"
    return "\n".join(
        [
            "# Two levels against one, over a slow link",
            "",
            f"`python tools/two_level_study.py {sizes} --seed {options.seed}`: two network namespaces of two ranks "
            f"each, joined by {RATE}; one MoE layer of {EXPERTS} experts, forward and backward, Top-k gate, "
            f"{options.tokens} tokens of width {options.width} per rank, fp32; the exchanges alternate, "
            f"{options.repetitions} repetitions after one that is not counted. 2 cores of an AMD EPYC shared by four "
            f"ranks, gloo, torch {torch.__version__.split('+')[0]}. Ratios are two-level / flat; time: median, and "
            "quartiles of the repetitions; bytes: of a step, per node and direction, as the layer counts them and as "
            "the link's own counter saw them.",
            "",
            "| k | MB flat | MB two-level | ratio counted | ratio on the link | ratio of step time (quartiles) "
            "| largest difference |",
            "|" + " --- |" * 7,
            *(row(of_k) for of_k in measured),
            "",
            "The largest difference is that of outputs and of the gradients of tokens, gate and experts, relative to "
            "the largest number of each tensor.",
            "",
        ]
    )


def row(of_k: dict[str, Any]) -> str:
    flat, two_level = of_k["flat"], of_k["two_level"]
    counted, seen = (np.median(two_level[f]) / np.median(flat[f]) for f in ("counted", "on_the_link"))
    time_ratios = np.divide(two_level["seconds"], flat["seconds"])
    low, high = np.quantile(time_ratios, [0.25, 0.75])
    return (
        f"| {of_k['k']} | {np.median(flat['counted']) / 1e6:.1f} | {np.median(two_level['counted']) / 1e6:.1f} "
        f"| {counted:.2f} | {seen:.2f} | {np.median(time_ratios):.2f} ({low:.2f}-{high:.2f}) "
        f"| {of_k['difference']:.0e} |"
    )


if __name__ == "__main__":
    main()
