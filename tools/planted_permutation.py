"""Does swap search undo a scrambled slot -> expert table? On trained recommenders, on 1 and 4 ranks.

    python tools/planted_permutation.py --runs runs/planted --report results/planted_permutation.md

trains one model per gate and number of experts (``dist-moe train configs/movielens_small.yaml`` for two
epochs), scrambles its table, searches on 4,096 validation examples, and writes a table: losses before,
scrambled and after, candidates screened and verified, and the time against a search that verifies the
same candidates by running the whole model for each.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_moe.config.files import json_line, parse_json
from dist_moe.data.batches import shard_batches
from dist_moe.engine.launch.environment import LaunchEnvironment
from dist_moe.recipes.callbacks.swap_search import search_swaps
from dist_moe.recipes.callbacks.table_search import in_double_precision
from dist_moe.recipes.supervised.evaluate import TrainedRun, trained_run
from dist_moe.search import SearchReport, SwapSearchConfig

GATES = ("hash", "top_k", "dselect_k", "comet")
EXPERTS = (8, 16, 32)
CONFIG = SwapSearchConfig()
NAIVE_SAMPLE = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/planted"), help="where the trained models are kept")
    parser.add_argument("--report", type=Path, default=Path("results/planted_permutation.md"))
    parser.add_argument("--seed", type=int, default=0, help="of the scrambling")
    parser.add_argument("--one", type=Path, metavar="RUN_DIR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        measured = measure(options.one, options.seed)
        if LaunchEnvironment.read().is_rank_zero:
            print(json_line(measured))
        return
    rows = []
    for gate in GATES:
        for num_experts in EXPERTS:
            run = train(options.runs / f"{gate}-{num_experts}", gate, num_experts)
            alone, together = (searched(run, options.seed, ranks) for ranks in (1, 4))
            rows.append(row(gate, num_experts, alone, together))
            print(rows[-1], flush=True)
    options.report.write_text(page(rows, options.seed), encoding="utf-8")


def train(run: Path, gate: str, num_experts: int) -> Path:
    if not (run / "summary.json").exists():
        overrides = [f"model.gate.name={gate}", f"model.num_experts={num_experts}", "train.epochs=2"]
        command = [sys.executable, "-m", "dist_moe", "train", "configs/movielens_small.yaml", *overrides]
        subprocess.run([*command, "--run-dir", str(run)], check=True, stdout=subprocess.DEVNULL)
    return run


def searched(run: Path, seed: int, ranks: int) -> dict[str, Any]:
    script = [__file__, "--one", str(run), "--seed", str(seed)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, *script],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        encoding="utf-8",
    )
    return parse_json(done.stdout.splitlines()[-1])


def measure(run_dir: Path, seed: int) -> dict[str, Any]:
    with trained_run(run_dir) as run:
        original = search_swaps(
            run.task,
            run.model,
            CONFIG.model_copy(update={"max_swaps": 0}),
            run.config.target_weights,
            LaunchEnvironment.read(),
        ).losses[0]
        (slot_table,) = run.model.tables.values()  # a recommender has one layer
        table = slot_table.table
        table.copy_(torch.randperm(table.shape[-1], generator=torch.Generator().manual_seed(seed)))
        started = time.perf_counter()
        report = search_swaps(run.task, run.model, CONFIG, run.config.target_weights, LaunchEnvironment.read())
        seconds = time.perf_counter() - started
        return summary(original, report, seconds, seconds_per_naive_candidate(run), table)


def summary(
    original: float, report: SearchReport, seconds: float, naive_seconds: float, table: torch.Tensor
) -> dict[str, Any]:
    return {
        "original": original,
        "scrambled": report.losses[0],
        "found": report.losses[-1],
        "swaps": len(report.swaps),
        "screened": report.screened,
        "verified": report.verified,
        "local_optimum": report.local_optimum,
        "speedup": naive_seconds * report.verified / seconds,
        "table": table.flatten().tolist(),
    }


@torch.no_grad()
def seconds_per_naive_candidate(run: TrainedRun) -> float:
    """Return how long the whole model takes on the search's examples, in the search's precision."""
    environment = LaunchEnvironment.read()
    examples = np.arange(min(CONFIG.examples, len(run.task.val)))
    parts = shard_batches(examples, CONFIG.batch_size, rank=environment.rank, world_size=environment.world_size)
    batches = [run.task.val.batch(index_B, examples) for index_B in parts]
    run.model.eval()
    times = []
    with in_double_precision(run.model):
        for _ in range(NAIVE_SAMPLE):
            started = time.perf_counter()
            for batch in batches:
                run.task.task_losses(run.model(*batch.inputs), batch)
            times.append(time.perf_counter() - started)
    return float(np.median(times))


def row(gate: str, num_experts: int, alone: dict[str, Any], together: dict[str, Any]) -> str:
    same = "yes" if alone["table"] == together["table"] else "no"
    excess = 100 * (alone["found"] / alone["original"] - 1)
    return (
        f"| {gate} | {num_experts} | {alone['original']:.5f} | {alone['scrambled']:.5f} | {alone['found']:.5f} "
        f"({excess:+.2f} %) | {alone['swaps']} | {alone['screened']} | {alone['verified']} | {alone['speedup']:.1f} "
        f"| {together['found']:.5f} | {same} |"
    )


def page(rows: list[str], seed: int) -> str:
    head = (
        "| gate | experts | loss | scrambled | found, 1 rank | swaps | screened | verified | times faster | "
        "found, 4 ranks | same table |"
    )
    return "\n".join([head, "|" + " --- |" * 11, *rows, "", f"Seed of the scrambling: {seed}.", ""])


if __name__ == "__main__":
    main()
