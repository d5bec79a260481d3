"""The measurements, as JSON, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_moe.config.files import json_text, parse_json
from tools.bench import exchange, ragged
from tools.bench.layer import CANDIDATES, LIMIT, OURS
from tools.bench.timing import Spread, ratio

Results = dict[str, dict[str, Any]]
"""By the job's name."""
JSON, MARKDOWN, PICTURE = "bench.json", "bench.md", "bench.png"
MIB = 2**20


def read(directory: Path) -> dict[str, Any]:
    """``about``, and ``results`` by the job's name; empty where nothing has been measured."""
    path = directory / JSON
    return parse_json(path.read_text(encoding="utf-8")) if path.exists() else {"about": {}, "results": {}}


def write(directory: Path, about: dict[str, Any], results: Results) -> None:
    """All three files; a reader never sees half of one."""
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / JSON, json_text({"about": about, "results": results}, indent=1))
    _replace(directory / MARKDOWN, page(about, results))
    if of_study(results, "layer"):
        draw(directory / PICTURE, results)


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def of_study(results: Results, study: str) -> Results:
    return {name: found for name, found in results.items() if name.startswith(f"{study}/")}


def ratios(measured: dict[str, Any], base: str = OURS) -> dict[str, Spread]:
    """Return the time of each candidate of a layer job over that of ``base``, which must be in every batch."""
    return {name: ratio(seconds, batch[base]) for batch in measured["batches"] for name, seconds in batch.items()} | {
        OURS: ratio(measured["batches"][0][OURS], measured["batches"][0][base])
    }


def page(about: dict[str, Any], results: Results) -> str:
    """The Markdown."""
    sections = [
        _head(about),
        _layers(of_study(results, "layer")),
        _memories(of_study(results, "memory")),
        _raggeds(of_study(results, "ragged")),
        _exchanges(of_study(results, "exchange")),
    ]
    return "\n".join(line for section in sections for line in section) + "\n"


def _head(about: dict[str, Any]) -> Iterator[str]:
    yield "# The layer beside its peers, and beside what the machine can do"
    yield ""
    yield f"`{about.get('command', 'dist-moe bench')}`, seed {about.get('seed', 0)}. {about.get('machine', '')}"
    yield ""


def _layers(results: Results) -> Iterator[str]:
    if not results:
        return
    yield "## Forward and backward"
    yield ""
    yield (
        "Gated SiLU experts, the same weights, tokens and choices of experts for all; outputs and all gradients were "
        "checked to be equal before anything was timed. Candidates take turns; a cell is the median over the rounds "
        "of (time of the candidate / time of ours in the same round), with the quartiles. In the names: t tokens per "
        "rank, d width, e experts, k experts per token; skewN: the fullest expert has 1 + N times the mean load; rN: N "
        "ranks of one thread; empty: the last rank has no tokens. On one rank, all cores. 'The limit' is the fastest "
        "way found to do nothing but the matrix products, outputs preallocated; its column says how long ours takes "
        "relative to it, the next one how long the limit takes relative to the roofline. Freed memory is kept by "
        "all candidates alike, as our training does (page faults are dear on virtual machines), except where it says "
        "'given back'."
    )
    yield ""
    names = [c.name for c in CANDIDATES if c.name != OURS]
    yield f"| workload | ours / limit | limit / roofline | {' | '.join(names)} |"
    yield "|" + " --- |" * (3 + len(names))
    notes: list[str] = []
    for job, measured in results.items():
        cells = ratios(measured)
        against = ratios(measured, LIMIT)[OURS]
        roof = min(s for batch in measured["batches"] for s in batch[LIMIT]) / measured["needed"]["roofline_s"]
        row = [_of_spread(cells[n]) if n in cells else _note(measured["left_out"].get(n, "-"), notes) for n in names]
        yield f"| {job.removeprefix('layer/')} | {_of_spread(against)} | {roof:.2f} | {' | '.join(row)} |"
    yield ""
    yield from (f"{number}. {note}" for number, note in enumerate(notes, start=1))
    yield ""
    ways = {job.removeprefix("layer/"): measured["limit"]["way"] for job, measured in results.items()}
    yield "The limit was " + "; ".join(f"'{way}' for {', '.join(_having(ways, way))}" for way in _distinct(ways)) + "."
    yield ""
    worst = max((error for measured in results.values() for error in measured["errors"].values()), default=0.0)
    yield f"Largest difference of anything that was timed, relative to the largest entry of its tensor: {worst:.0e}."
    yield ""


def _distinct(ways: dict[str, str]) -> list[str]:
    return sorted(set(ways.values()))


def _having(ways: dict[str, str], way: str) -> list[str]:
    return [job for job, of_job in ways.items() if of_job == way]


def _note(reason: str, notes: list[str]) -> str:
    if reason == "-":
        return "-"
    if reason not in notes:
        notes.append(reason)
    return f"({notes.index(reason) + 1})"


def _of_spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def _memories(results: Results) -> Iterator[str]:
    if not results:
        return
    yield "## Peak memory"
    yield ""
    yield (
        "Of forward and backward together, weights not counted, over what the mathematics needs: tokens, outputs, the "
        "gradients of both and of the weights, and of each row what the backward pass uses (itself, the two that went "
        "into the activation, the result). In brackets: the largest single tensor over a (T, E, C) table."
    )
    yield ""
    names = [c.name for c in CANDIDATES if any(c.name in found["measured"] for found in results.values())]
    yield f"| workload | {' | '.join(names)} |"
    yield "|" + " --- |" * (1 + len(names))
    for job, found in results.items():
        needed, dense = sum(found["needed"].values()), found["tokens_experts_capacity"]
        row = [
            f"{(of['peak'] + found['there_before']) / needed:.2f} ({of['largest'] / dense:.2f})" if of else "-"
            for of in (found["measured"].get(name) for name in names)
        ]
        yield f"| {job.removeprefix('memory/')} | {' | '.join(row)} |"
    yield ""


def _raggeds(results: Results) -> Iterator[str]:
    if not results:
        return
    yield "## Ragged against padded"
    yield ""
    yield (
        "Tokens need a falling share of the k experts that they may have. Relative to the ragged layer at share 1. "
        "Memory: peak above what does not depend on assignments (outputs, gradients of tokens and weights)."
    )
    yield ""
    for job, found in results.items():
        yield f"{job.removeprefix('ragged/')}:"
        yield ""
        yield "| share | time, ragged | time, padded | wire bytes, ragged | padded | memory, ragged | padded |"
        yield "|" + " --- |" * 7
        by_kind = {kind: [m for m in found["measured"] if m["kind"] == kind] for kind in ("ragged", "padded")}
        columns = {
            (quantity, kind): _relative(quantity, by_kind[kind], by_kind["ragged"][0], found["fixed_bytes"])
            for quantity in ("time", "bytes", "memory")
            for kind in ("ragged", "padded")
        }
        shares = [m["share"] for m in by_kind["ragged"]]
        for place, share in enumerate(shares):
            cells = [f"{column[place]:.3f}" if column else "-" for column in columns.values()]
            yield f"| {share:g} | {' | '.join(cells)} |"
        slopes = [f"{ragged.slope(shares, column):.2f}" if column else "-" for column in columns.values()]
        yield f"| slope | {' | '.join(slopes)} |"
        yield ""


def _relative(quantity: str, of_kind: list[dict[str, Any]], base: dict[str, Any], fixed: int) -> list[float]:
    """Nothing for bytes where there is one rank."""
    if quantity == "time":
        return [ratio(m["seconds"], base["seconds"]).median for m in of_kind]
    if quantity == "bytes":
        return [m["wire_bytes"] / base["wire_bytes"] for m in of_kind] if base["wire_bytes"] else []
    return [(m["memory"]["peak"] - fixed) / (base["memory"]["peak"] - fixed) for m in of_kind]


def _exchanges(results: Results) -> Iterator[str]:
    if not results:
        return
    yield "## The exchange"
    yield ""
    yield (
        f"Rows there and back, and their gradients, over `{exchange.RAW}` of the same bytes with outputs preallocated. "
        "Regrouping: by local expert, where rows come by rank."
    )
    yield ""
    yield f"| workload | MiB sent by a rank | {exchange.TRAVEL} | {exchange.WHOLE} |"
    yield "| --- | --- | --- | --- |"
    for job, found in results.items():
        seconds = found["seconds"]
        cells = [_of_spread(ratio(seconds[way], seconds[exchange.RAW])) for way in (exchange.TRAVEL, exchange.WHOLE)]
        yield f"| {job.removeprefix('exchange/')} | {found['bytes_sent'] / MIB:.1f} | {' | '.join(cells)} |"
    yield ""


def draw(path: Path, results: Results) -> None:
    """Time over the limit, a mark per candidate and workload."""
    from matplotlib.figure import Figure

    layers = of_study(results, "layer")
    figure = Figure(figsize=(11, 1.5 + 0.36 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    names = [c.name for c in CANDIDATES]
    for number, name in enumerate(names):
        points = [(ratios(m, LIMIT)[name].median, place) for place, m in enumerate(layers.values()) if _has(m, name)]
        if points:
            marks = {"s": 70, "zorder": 3} if name == OURS else {"s": 28}
            axes.scatter(*zip(*points, strict=True), label=name, marker="o^v<>sPXD*h"[number], **marks)
    axes.set_yticks(range(len(layers)), [job.removeprefix("layer/") for job in layers])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time of forward and backward / time of nothing but the matrix products")
    axes.grid(axis="x", alpha=0.4, which="both")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _has(measured: dict[str, Any], name: str) -> bool:
    return any(name in batch for batch in measured["batches"])
