"""A minute's benchmark against committed ratios: has the layer become slower, relative to what runs beside it?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_moe.config.files import json_text, parse_json
from dist_moe.errors import UserError
from tools.bench import exchange, jobs
from tools.bench.jobs import Job
from tools.bench.layer import LIMIT, OURS
from tools.bench.workloads import Workload

COMMITTED = jobs.REPOSITORY / "results" / "bench_ratios.json"
BESIDE = ("ours, padded (T, K)", "DeepSpeed MoE, dropless")
"""Peers that every installation has."""
_PLAIN = Workload(1024, 512, 16, 2)
WORKLOADS = (_PLAIN, Workload(1024, 512, 64, 2, max_violation=1.0), Workload(256, 256, 8, 2, "bfloat16"))
EXCHANGE = Workload(1024, 512, 16, 2, ranks=2)


@dataclass(frozen=True)
class Ratio:
    """Median of the rounds' ratios, and the spread in which nine tenths of them lie."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: list[float]) -> Ratio:
        low, median, high = (float(q) for q in np.quantile(numbers, [0.05, 0.5, 0.95]))
        return cls(median, low, high)


def measure(seconds: float, seed: int, say: Callable[[str], None]) -> dict[str, Ratio]:
    """By name: time of ours over that of something beside it."""
    found: dict[str, Ratio] = {}
    for workload in WORKLOADS:
        job = Job("layer", workload, seconds, seed, BESIDE)
        batches = jobs.run(job, BESIDE, say)["batches"]
        for name, base in ((name, base) for name in (LIMIT, *BESIDE) for base in batches if name in base):
            found[f"{workload.name}: ours / {name}"] = _between(base[OURS], base[name])
    times: dict[str, list[float]] = jobs.run(Job("exchange", EXCHANGE, seconds, seed), (), say)["seconds"]
    found[f"{EXCHANGE.name}: exchange / raw"] = _between(times[exchange.WHOLE], times[exchange.RAW])
    return found


def _between(ours: list[float], base: list[float]) -> Ratio:
    return Ratio.of([mine / other for mine, other in zip(ours, base, strict=True)])


def slower(found: dict[str, Ratio], committed: dict[str, Ratio]) -> dict[str, str]:
    """By name, a sentence on each median above its committed spread; a figure that is not committed is one too."""
    sentences = {}
    for name, now in found.items():
        if name not in committed:
            sentences[name] = f"{name}: {now.median:.2f}, of which nothing is committed"
        elif now.median > committed[name].high:
            before = committed[name]
            sentences[name] = f"{name}: {now.median:.2f}, committed {before.median:.2f} (up to {before.high:.2f})"
    return sentences


def read(path: Path = COMMITTED) -> dict[str, Ratio]:
    """Raises UserError where nothing is committed."""
    if not path.exists():
        raise UserError(f"{path} does not exist; write it first, on a quiet machine: dist-moe bench --commit-ratios")
    return {name: Ratio(**numbers) for name, numbers in parse_json(path.read_text(encoding="utf-8"))["ratios"].items()}


def write(found: dict[str, Ratio], about: dict[str, Any], path: Path = COMMITTED) -> None:
    told = {"about": about, "ratios": {name: asdict(ratio) for name, ratio in found.items()}}
    path.write_text(json_text(told, indent=1), encoding="utf-8")
