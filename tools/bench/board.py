"""The cost of TensorBoard and the alarms on the first rank at 60 layers of 256 experts, in processor time.

    python tools/bench/board.py --report results/bench_board.md

Records of a run with top-8 routing of 16,384 tokens, collected every ten steps, go through the statistics of the load,
the tracker and the alarms. No model is needed: what they take does not depend on it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from dist_moe.engine.health.alarm import RouterAlarm
from dist_moe.engine.monitor.load import HISTOGRAM, describe_load
from dist_moe.engine.monitor.tensorboard import TensorBoardTracker

LAYERS, EXPERTS, TOKENS, PER_TOKEN, LOG_EVERY = 60, 256, 16_384, 8, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    page = table(options.steps)
    print(page)
    if options.report is not None:
        options.report.write_text(page, encoding="utf-8")


def table(steps: int) -> str:
    """Markdown: milliseconds a step by part, and the step of which all of them are a hundredth."""
    spent = dict.fromkeys(("numbers of the load", "scalars and load history", "pictures", "alarms"), 0.0)

    def take(part: str, function: Callable[..., Any], *arguments: Any) -> None:
        started = time.thread_time()
        function(*arguments)
        spent[part] += time.thread_time() - started

    with tempfile.TemporaryDirectory() as directory:
        tracker, alarm = TensorBoardTracker(Path(directory), 0, print), RouterAlarm()
        draw_load = tracker._draw_load
        tracker._draw_load = lambda: take("pictures", draw_load)  # type: ignore[method-assign]
        layers = [SimpleNamespace(experts=SimpleNamespace(num_experts=EXPERTS))] * LAYERS
        trainer: Any = SimpleNamespace(layers=layers, tables={}, monitor=SimpleNamespace(say=print, text=tracker.text))
        alarm.on_start(trainer)
        for first in range(0, steps, LOG_EVERY):
            records = [record_of(first + i + 1) for i in range(LOG_EVERY)]
            take("numbers of the load", describe_load, records, [EXPERTS] * LAYERS)
            take("alarms", alarm.on_records, trainer, records)
            for record in records:
                take("scalars and load history", tracker.step, record)
            take("scalars and load history", tracker.flush)
        take("scalars and load history", tracker.close)
        size = sum(path.stat().st_size for path in Path(directory).iterdir())
    spent["scalars and load history"] -= spent["pictures"]
    total = sum(spent.values())
    rows = [f"| {part} | {1000 * seconds / steps:.2f} |" for part, seconds in spent.items()]
    return "\n".join(
        [
            "# What TensorBoard and alarms cost at 60 layers of 256 experts",
            "",
            f"`python tools/bench/board.py --steps {steps}`: processor time on the first rank, mean of {steps} steps.",
            f"The events take {size / steps / 1000:.1f} kB a step. A hundredth of a step of "
            f"{100 * total / steps:.2f} s goes there.",
            "",
            "| part | ms a step |",
            "| --- | --- |",
            *rows,
            f"| all | {1000 * total / steps:.2f} |",
            "",
        ]
    )


def record_of(step: int) -> dict[str, Any]:
    """A record with as many numbers as a run of a language model has."""
    rng = np.random.default_rng(step % 10)
    load = rng.multinomial(TOKENS * PER_TOKEN, rng.dirichlet(np.full(EXPERTS, 5.0)), size=LAYERS).tolist()
    histogram = [0] * PER_TOKEN + [TOKENS * LAYERS] + [0] * (EXPERTS - PER_TOKEN)
    numbers = {f"number_{i}": 1.0 for i in range(25)}
    return numbers | {"step": step, "load": load, HISTOGRAM: histogram, "tokens": float(TOKENS)}


if __name__ == "__main__":
    main()
