"""Predictions of `dist-moe plan` for a step, against real steps: constants measured in the same processes, just before.

    python -m tools.validate_plan --report results/plan_validation.md    # as root, on Linux with iproute2

Layouts: 1, 2 and 4 ranks of this machine; two network namespaces of two ranks each, with links of 1 Gbit/s and of
200 Mbit/s. On each: one MoE layer, forward and backward, and a whole training step (recommender with Top-k gates,
DeepSpeed, ZeRO 1, AdamW), flat and, across namespaces, two-level. Rounds of measuring and running alternate; the
tables show medians over rounds. The prediction of a round knows that round's constants and its load skew, nothing of
its times.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from dist_moe.config.files import json_line, parse_json
from dist_moe.engine.deepspeed.config import complete_deepspeed_section
from dist_moe.engine.deepspeed.engine import ExpertParallelEngine
from dist_moe.engine.launch.environment import LaunchEnvironment, disable_malloc_trim
from dist_moe.engine.launch.process_groups import ParallelConfig, ProcessGroups, process_groups
from dist_moe.experts import DenseReLUBank, DenseReLUConfig
from dist_moe.gates import TopK, TopKConfig
from dist_moe.layer import MoE
from dist_moe.models import RecommenderConfig, RunShape
from dist_moe.parallel import ProcessWorld, experts_of_rank, gather_objects, wait_for_all
from dist_moe.planning.scale.machine import Machine
from dist_moe.planning.scale.measure import measure_machine, processors_here
from dist_moe.planning.scale.spread import Layout
from dist_moe.planning.scale.step_time import ExchangeName, Prediction, predict
from dist_moe.planning.scale.work import work_of_layer, work_of_model
from dist_moe.recipes.supervised.config import SupervisedConfig
from tools.namespaces import cluster, why_not
from tools.ranks import run_ranks

PORT = 29587
PATIENCE_S = 600
AIM = 0.2
STEPS_PER_ROUND = 3
USERS, ITEMS = 6040, 3706
EXPERTS, K = 16, 4


@dataclass(frozen=True)
class Place:
    """Where ranks run. ``rate``: of the links between namespaces, as tc writes it; None: no namespaces."""

    nodes: int
    per_node: int
    rate: str | None = None

    @property
    def label(self) -> str:
        return f"{self.nodes} x {self.per_node}" + (f", {self.rate}/s" if self.rate else "")

    @property
    def exchanges(self) -> tuple[ExchangeName, ...]:
        return ("flat",) if self.nodes == 1 else ("flat", "two_level")


PLACES = (Place(1, 1), Place(1, 2), Place(1, 4), Place(2, 2, "1gbit"), Place(2, 2, "200mbit"))


def main() -> None:
    options = parse()
    if options.place is not None:
        measured = on_rank(PLACES[options.place], options)
        if os.environ["RANK"] == "0":
            options.measured.write_text(json_line(measured), encoding="utf-8")
        return
    signal.signal(signal.SIGTERM, _leave)  # else ranks and namespaces would be left
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for number in options.places:
            place = PLACES[number]
            if place.rate is not None and (reason := why_not()) is not None:
                raise SystemExit(f"no network namespaces here: {reason}; choose --places 0 1 2")
            results[place.label] = run_place(number, Path(directory) / f"{number}.json")
            print(rows_of(place.label, results[place.label]), flush=True)
    options.report.parent.mkdir(exist_ok=True)
    options.report.write_text(page(results, options), encoding="utf-8")


def _leave(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=Path("results/plan_validation.md"))
    parser.add_argument("--tokens", type=int, default=2048, help="of every rank")
    parser.add_argument("--width", type=int, default=256, help="of a token, and of an expert's result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", type=int, nargs="*", default=[*range(len(PLACES))], help="numbers of layouts")
    parser.add_argument("--place", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_place(number: int, measured: Path) -> list[dict[str, Any]]:
    """This script on every rank of a layout, until all have ended well."""
    place = PLACES[number]
    arguments = [*sys.argv[1:], "--place", str(number), "--measured", str(measured)]
    words = [sys.executable, "-m", "tools.validate_plan", *arguments]
    with nullcontext([None] * place.nodes) if place.rate is None else cluster(place.nodes, place.rate) as nodes:
        run_ranks(words, nodes, place.per_node, port=PORT + number, patience_s=PATIENCE_S)
    content: list[dict[str, Any]] = parse_json(measured.read_text(encoding="utf-8"))
    return content


def on_rank(place: Place, options: argparse.Namespace) -> list[dict[str, Any]]:
    """On every rank: per round, kind of step and exchange, what was predicted and what it took."""
    disable_malloc_trim()
    torch.set_num_threads(1)
    ranks = place.nodes * place.per_node
    with process_groups(LaunchEnvironment.read(), ParallelConfig(expert_parallel_size=ranks)) as groups:
        layout = Layout(place.nodes, place.per_node, ranks)
        cases = [case for exchange in place.exchanges for case in cases_of(exchange, groups, layout, options)]
        for case in cases:
            case.run()
        rounds = []
        for _ in range(options.rounds):
            machine = measure_machine(groups, processors_here() / place.nodes, "here")
            rounds += [case.compare(machine) for case in cases]
        return rounds


@dataclass
class Case:
    """A kind of step over one exchange: ``run`` does it, ``predict`` says how long it will take."""

    name: str
    exchange: ExchangeName
    run: Callable[[], None]
    predict: Callable[[Machine], Prediction]
    traffic: Any
    skew: float

    def compare(self, machine: Machine) -> dict[str, Any]:
        predicted = self.predict(machine)
        seconds = []
        for _ in range(STEPS_PER_ROUND):
            self.traffic.reset()
            wait_for_all()
            started = time.perf_counter()
            self.run()
            wait_for_all()
            seconds.append(max(gather_objects(time.perf_counter() - started)))
        counted = gather_objects(self.traffic.bytes)
        return {
            "step": self.name,
            "exchange": self.exchange,
            "predicted": predicted.seconds.total,
            "parts": asdict(predicted.seconds),
            "measured": statistics.median(seconds),
            "bytes_predicted": predicted.exchange_bytes.total,
            "bytes_counted": statistics.fmean(counted),
            "skew": self.skew,
        }


def cases_of(exchange: ExchangeName, groups: ProcessGroups, layout: Layout, options: argparse.Namespace) -> list[Case]:
    world = groups.world
    if exchange == "flat" and isinstance(world, ProcessWorld):  # the same ranks, without levels
        flat = ProcessWorld(world.group, world.node_of_rank, world.traffic, options=world.options)
        groups = replace(groups, world=flat)
    return [layer_case(exchange, groups, layout, options), training_case(exchange, groups, layout, options)]


def layer_case(exchange: ExchangeName, groups: ProcessGroups, layout: Layout, options: argparse.Namespace) -> Case:
    torch.manual_seed(options.seed)
    gate = TopK(options.width, EXPERTS, K)
    bank = DenseReLUBank(options.width, options.width, EXPERTS, experts_of_rank(EXPERTS, groups.world))
    layer = MoE(gate, bank, world=groups.world)
    generator = torch.Generator().manual_seed(options.seed * 1000 + groups.environment.rank)
    x_TD = torch.randn(options.tokens, options.width, generator=generator)
    work, skew = work_of_layer(bank, [gate], K), skew_of(layer(x_TD).rows_computed)

    def run() -> None:
        layer.zero_grad()
        layer(x_TD.clone().requires_grad_()).outputs[0].sum().backward()

    def predicted(machine: Machine) -> Prediction:
        return predict(machine, work, layout, options.tokens, exchange, skew=skew, training=False)

    return Case("layer", exchange, run, predicted, groups.world.traffic, skew)


def training_case(exchange: ExchangeName, groups: ProcessGroups, layout: Layout, options: argparse.Namespace) -> Case:
    torch.manual_seed(options.seed)
    half = options.width // 2
    gate = TopKConfig(name="top_k", k=K)
    model_config = RecommenderConfig(
        embedding_dim=half,
        experts=DenseReLUConfig(units=options.width),
        tower_units=options.width,
        num_experts=EXPERTS,
        gate=gate,
    )
    config = SupervisedConfig(model=model_config)
    model = model_config.build(USERS, ITEMS, RunShape(groups.world, 1000))
    model.train()
    ranks = layout.ranks
    section = complete_deepspeed_section(config.deepspeed, ranks * options.tokens, ranks)
    work = work_of_model(model, config, K, states=2, value_bytes=4)
    engine = ExpertParallelEngine(model, section, groups)
    generator = torch.Generator().manual_seed(options.seed * 1000 + groups.environment.rank)
    user_B = torch.randint(USERS, (options.tokens,), generator=generator)
    item_B = torch.randint(ITEMS, (options.tokens,), generator=generator)
    label_B = torch.rand(options.tokens, generator=generator).round()
    skew = skew_of(model(user_B, item_B).layers[0].rows_computed)

    def run() -> None:
        engine.backward(loss_of(engine, user_B, item_B, label_B))
        engine.step()

    def predicted(machine: Machine) -> Prediction:
        return predict(machine, work, layout, options.tokens, exchange, skew=skew)

    return Case("training step", exchange, run, predicted, groups.world.traffic, skew)


def loss_of(engine: nn.Module, user_B: Tensor, item_B: Tensor, label_B: Tensor) -> Tensor:
    watched_B, rating_B = engine(user_B, item_B).predictions
    return nn.functional.binary_cross_entropy_with_logits(watched_B, label_B) + (rating_B - label_B).square().mean()


def skew_of(rows: int) -> float:
    everyones = gather_objects(rows)
    return max(1.0, max(everyones) / statistics.fmean(everyones))


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [one["predicted"] / one["measured"] for one in rounds]
    parts = {
        name: statistics.median(one["parts"][name] / one["predicted"] for one in rounds) for name in rounds[0]["parts"]
    }
    return {
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "bytes": statistics.median(
            one["bytes_predicted"] / one["bytes_counted"] if one["bytes_counted"] else 1.0 for one in rounds
        ),
        "skew": rounds[0]["skew"],
        "parts": parts,
    }


def rows_of(label: str, rounds: list[dict[str, Any]]) -> str:
    kinds = sorted({(one["step"], one["exchange"]) for one in rounds})
    lines = []
    for step, exchange in kinds:
        of_kind = summary([one for one in rounds if (one["step"], one["exchange"]) == (step, exchange)])
        largest = sorted(of_kind["parts"].items(), key=lambda part: -part[1])[:3]
        shares = ", ".join(f"{name} {share:.0%}" for name, share in largest)
        within = "yes" if abs(of_kind["ratio"] - 1) <= AIM else "no"
        lines.append(
            f"| {label} | {step} | {exchange} | {of_kind['ratio']:.2f} | {of_kind['low']:.2f}-{of_kind['high']:.2f} "
            f"| {within} | {of_kind['bytes']:.3f} | {of_kind['skew']:.2f} | {shares} |"
        )
    return "\n".join(lines)


def page(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> str:
    sizes = f"--tokens {options.tokens} --width {options.width} --rounds {options.rounds} --seed {options.seed}"
    return "\n".join(
        [
            "# Predicted step times against measured ones",
            "",
            f"`python -m tools.validate_plan {sizes}`: {EXPERTS} experts, k = {K}, {options.tokens} tokens of width "
            f"{options.width} per rank, fp32, gloo, {processors_here()} CPU cores, one thread per rank, torch "
            f"{torch.__version__.split('+')[0]}. A round measures the machine's constants, then runs "
            f"{STEPS_PER_ROUND} steps of each kind; the ratio is predicted / measured seconds of a step, median (and "
            f"range) of the rounds, the aim is {1 - AIM:.2f} to {1 + AIM:.2f}. Nothing is fitted to the steps. "
            "Bytes: predicted of uniform choices / counted by the layer. Skew: expert rows of the heaviest rank over "
            "the mean.",
            "",
            "| nodes x ranks | step | exchange | predicted / measured | range | within 20 % | bytes | skew "
            "| largest parts |",
            "|" + " --- |" * 9,
            *(rows_of(label, rounds) for label, rounds in results.items()),
            "",
        ]
    )


if __name__ == "__main__":
    main()
