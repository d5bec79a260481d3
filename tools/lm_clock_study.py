"""The clock of mixtures: how soon, on the same cores, a language model with experts has its dense twin's last loss.

    python tools/lm_clock_study.py --report results/lm_clock.md

trains models of ``lm_study.py``, the dense twin first, each with several seeds, and validates often. Where a model's
validation loss falls below the twin's last one of the same seed is interpolated between validations. A step's time,
forward and backward pass of the trained models of seed 0 on a batch of their size, is taken by turns, in processor time
of one thread, as a machine that other work shares tells nothing else: the product of both is the time that the model
needs, over that of the twin's whole training. Updates and validations are not counted. Runs that are complete are not
trained again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from dist_moe.config.files import parse_json
from dist_moe.engine.checkpoint import place_weights, read_model
from dist_moe.engine.checkpoint.files import tested_checkpoint
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.recipes.recipe import load_config
from dist_moe.tasks.objective import WeightedObjective
from tools.bench.timing import Spread, interleaved, ratio
from tools.lm_study import BITS, VARIANTS, built, study_run
from tools.studies import beside, command_given, machine, study_parser, train_all

Curve = list[tuple[int, float]]
"""Validation loss by step, the last one at the end of training."""


def main() -> None:
    options = parse()
    runs = {(name, seed): study_run(name, seed, options) for seed in range(options.seeds) for name in options.variants}
    train_all(runs.values(), options.at_once)
    curves = {key: curve_of(run.directory, run.summary) for key, run in runs.items()}
    bits = {key: float(run.summary["test"][BITS]) for key, run in runs.items()}
    costs = step_costs({name: runs[name, 0].directory for name in options.variants}, options.rounds)
    text = page(curves, bits, costs, options)
    options.report.write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, "lm_clock_study", "results/lm_clock.md")
    parser.add_argument("--config", type=Path, default=Path("configs/lm_small.yaml"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["dense twin", "Top-k", "Hash", "COMET"])
    parser.add_argument("--validate-every", type=int, default=38, metavar="STEPS")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration, for all runs alike")
    options = parser.parse_args()
    options.overrides = (*options.overrides, f"train.validate_every={options.validate_every}")
    return options


def curve_of(directory: Path, summary: dict[str, Any]) -> Curve:
    lines = RunDirectory(directory).metrics.read_text(encoding="utf-8").splitlines()
    records = [parse_json(line) for line in lines]
    curve = {int(record["step"]): float(record["validation"]["loss"]) for record in records if "validation" in record}
    curve[max(int(record["step"]) for record in records)] = float(summary["val"]["loss"])
    return sorted(curve.items())


def reached(curve: Curve, loss: float) -> float | None:
    """Return the step at which the curve first is at ``loss``, between its points on a straight line; None: never."""
    if curve[0][1] <= loss:
        return curve[0][0]
    for (before, above), (after, below) in pairwise(curve):
        if below <= loss:
            return before + (after - before) * (above - loss) / (above - below)
    return None


def step_costs(directories: dict[str, Path], rounds: int) -> dict[str, Spread]:
    """Return the time of a step of each trained model over that of the first one."""
    torch.set_num_threads(1)
    seconds = interleaved({name: step_of(path) for name, path in directories.items()}, rounds, clock="cpu")
    base = seconds[next(iter(seconds))]
    return {name: ratio(each, base) for name, each in seconds.items()}


def step_of(directory: Path) -> partial[None]:
    model, _ = built(directory)
    place_weights(model, read_model(tested_checkpoint(directory)))
    config: Any = load_config(RunDirectory(directory).config, ["parallel.expert_parallel_size=1"])
    task = config.data.open(progress=False)
    index = np.arange(config.train.batch_size)
    return partial(take_step, model.train(), WeightedObjective(task, config.target_weights, 1), task.train, index)


def take_step(model: Any, objective: WeightedObjective, part: Any, index: np.ndarray) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    objective(model, part.batch(index, index)).loss.backward()


def page(
    curves: dict[tuple[str, int], Curve],
    bits: dict[tuple[str, int], float],
    costs: dict[str, Spread],
    options: argparse.Namespace,
) -> str:
    twin = options.variants[0]
    lines = [
        f"# When a mixture has the last loss of its {twin}",
        "",
        f"`{command_given()}`: {options.seeds} seed(s) each. Test bits per byte, mean ± standard deviation (mean "
        f"difference to the {twin}: 95 % interval, paired by seed; a star where it does not contain 0). Steps, as a "
        f"share of the training, until the validation loss is the {twin}'s last one of the same seed. Time of a step, "
        f"forward and backward, over the {twin}'s: median and quartiles of {options.rounds} rounds by turns, processor "
        f"time, one thread. The last column is the product of both. {machine()}.",
        "",
        "| model | bits per byte | steps | time of a step | time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in options.variants:
        own, other = ([bits[of, seed] for seed in range(options.seeds)] for of in (name, twin))
        shares = [share(curves[name, seed], curves[twin, seed]) for seed in range(options.seeds)]
        cost = costs[name]
        cells = [beside(own, None if name == twin else other), shown(shares)]
        cells += [f"{cost.median:.2f} ({cost.low:.2f} to {cost.high:.2f})"]
        cells += [shown([None if each is None else each * cost.median for each in shares])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def share(curve: Curve, twin: Curve) -> float | None:
    """Return the share of its steps after which the curve is where the twin's ends."""
    step = reached(curve, twin[-1][1])
    return None if step is None else step / curve[-1][0]


def shown(shares: Sequence[float | None]) -> str:
    """Return the mean, and the least and the most; by how many seeds it was never reached."""
    found = [each for each in shares if each is not None]
    never = f"never by {len(shares) - len(found)} of {len(shares)} seeds" if len(found) < len(shares) else ""
    mean = f"{statistics.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""
    return ", ".join(part for part in (mean, never) if part)


if __name__ == "__main__":
    main()
