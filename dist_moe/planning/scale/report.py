"""Planned sizes as tables, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from dist_moe.planning.scale.machine import Machine
from dist_moe.planning.scale.planned import PlannedSize, StepTraffic
from dist_moe.planning.scale.spread import Layout
from dist_moe.planning.scale.step_time import Bytes, Seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = tuple(field.name for field in fields(Seconds))


def size_table(machine: Machine, sizes: Sequence[PlannedSize]) -> str:
    """Return a row per size and exchange: where a step's time goes, bytes per rank, efficiency, memory."""
    columns = (*PARTS, "step", "inside", "between", "gradients", "tokens/s", "efficiency", "of one", "memory")
    lines = [
        f"machine {machine.name}: {machine.source}",
        f"{'':31}{' time of a step in ms ':-^88}{' MB sent by a rank ':-^33}",
        f"{_HEAD}" + "".join(f"{name:>11}" for name in columns),
    ]
    for size in sizes:
        for prediction, of_one in zip(size.predictions, size.against_one, strict=True):
            seconds = prediction.seconds
            cells = [f"{1e3 * getattr(seconds, part):.3g}" for part in PARTS] + [f"{1e3 * seconds.total:.4g}"]
            cells += _megabytes(prediction.exchange_bytes, prediction.gradient_bytes)
            cells += [f"{size.batch_size / seconds.total:.3g}", f"{prediction.efficiency:.1%}", f"{of_one:.1%}"]
            lines.append(_row(size, prediction.exchange, cells))
    known = machine.memory_bytes_per_rank
    lines += [
        f"{_place(size.layout)}: {size.memory / 2**30:.2f} GiB do not fit into the {known / 2**30:.0f} GiB of a rank"
        for size in sizes
        if known is not None and size.memory > known
    ]
    return "\n".join(
        [
            *lines,
            "split: ranks over which the experts are split; efficiency: share of the step in products that an even "
            "load needs;",
            "of one: tokens/s per rank, over those of a single rank that takes the whole batch; memory: a rank's "
            "states and",
            "activations under even load",
        ]
    )


def traffic_table(model: str, steps: Sequence[StepTraffic]) -> str:
    """Return a row per size and exchange, and what is not predicted. ``model``: its name."""
    columns = ("tokens", "rows", "TFLOP", "inside", "between", "gradients", "memory")
    lines = [
        f"{'':31}{'':33}{' MB sent by a rank ':-^33}",
        f"{_HEAD}" + "".join(f"{name:>11}" for name in columns),
    ]
    for step in steps:
        flops = "-" if step.flops is None else f"{step.flops / 1e12:.4g}"
        for exchange, sent in step.sent.items():
            cells = [f"{step.tokens:,.0f}", f"{step.expert_rows:,.0f}", flops]
            lines.append(_row(step, exchange, cells + _megabytes(sent, step.gradient_bytes)))
    return "\n".join(
        [
            *lines,
            "of a rank and step; rows: that its experts compute in all MoE layers; TFLOP: forward and backward;",
            "memory: states and activations under even load.",
            f"The time of a step is not predicted for model.name={model}: 'dist-moe plan --measure' has no rates of "
            "attention,",
            "norms and the loss over a vocabulary.",
        ]
    )


_HEAD = f"{'nodes x ranks':14}{'split':>6} {'exchange':10}"


def _row(size: PlannedSize | StepTraffic, exchange: str, cells: Sequence[str]) -> str:
    columns = (*cells, f"{size.memory / 2**30:.2f} GiB")
    return f"{_place(size.layout):14}{size.layout.group:>6} {exchange:10}" + "".join(f"{cell:>11}" for cell in columns)


def _megabytes(sent: Bytes, gradients: float) -> list[str]:
    return [f"{count / 1e6:.4g}" for count in (sent.inside, sent.between, gradients)]


def _place(layout: Layout) -> str:
    return f"{layout.nodes} x {layout.per_node}"


def draw_sizes(machine: Machine, sizes: Sequence[PlannedSize], path: Path) -> None:
    """Write a PNG: parts of a step by number of ranks, a bar per exchange; and tokens per second, with the ideal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    bars, speed = figure.subplots(1, 2)
    _draw_parts(bars, sizes)
    _draw_speed(speed, sizes)
    figure.suptitle(f"{machine.name} ({machine.source})", fontsize="small")
    figure.savefig(path, format="png", dpi=120)


def _draw_parts(axes: Axes, sizes: Sequence[PlannedSize]) -> None:
    exchanges = [prediction.exchange for prediction in sizes[0].predictions]
    width = 0.8 / len(exchanges)
    for number in range(len(exchanges)):
        places = [place - 0.4 + (number + 0.5) * width for place in range(len(sizes))]
        bottoms = [0.0] * len(sizes)
        for colour, part in enumerate(PARTS):
            heights = [1e3 * getattr(size.predictions[number].seconds, part) for size in sizes]
            label = None if number else part
            axes.bar(places, heights, width * 0.92, bottom=bottoms, color=f"C{colour}", label=label)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(sizes)), [_place(size.layout) for size in sizes])
    axes.set_xlabel(f"nodes x ranks; bars from left to right: {', '.join(exchanges)}")
    axes.set_ylabel("ms per step")
    axes.legend(fontsize="small")


def _draw_speed(axes: Axes, sizes: Sequence[PlannedSize]) -> None:
    ranks = [size.layout.ranks for size in sizes]
    for number, first in enumerate(sizes[0].predictions):
        speeds = [size.batch_size / size.predictions[number].seconds.total for size in sizes]
        axes.plot(ranks, speeds, marker="o", label=first.exchange)
    first_size = sizes[0]
    per_rank = first_size.batch_size / first_size.predictions[0].seconds.total / first_size.layout.ranks
    axes.plot(ranks, [per_rank * count for count in ranks], linestyle=":", color="grey", label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="tokens per second")
    axes.legend(fontsize="small")
