"""The report as one HTML file: styles, pictures and numbers inside it, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dist_moe.engine.monitor.board_tags import split_metrics
from dist_moe.engine.monitor.load import effective_experts
from dist_moe.report.atlas import Atlas
from dist_moe.report.drawing import Line, heat_map, line_chart
from dist_moe.report.runs import Curve, RunRecord

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1d1d1f; background: #fff; margin: 0 auto; max-width: 1240px;
  padding: 12px 16px 48px; }
h1 { font-size: 1.5rem; margin: .4em 0 } h2 { font-size: 1.15rem; margin: 1.6em 0 .4em; border-top: 1px solid #ddd;
  padding-top: .8em }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 14px 22px }
svg { width: 100%; height: auto; display: block } img { max-width: 100%; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 14px }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e6e6e6; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td.words { text-align: left; white-space: normal; min-width: 16em }
pre { overflow-x: auto; background: #f6f6f6; padding: 8px; font-size: 12.5px }
summary { cursor: pointer; margin: .5em 0 }
.note { font-size: 11px; fill: #333 } .head { font-size: 13px; font-weight: 600 } .grid { stroke: #e4e4e4 }
.axis { stroke: #777; fill: none } .line { fill: none; stroke-width: 1.8 } .cells { image-rendering: pixelated }
p.small { font-size: 13px; color: #444 }
"""

_CHARTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "", ("loss", "total_loss")),
    ("Experts per token", "", ("active_experts",)),
    ("Learning rate", "", ("lr",)),
    ("Norm of the gradient", "", ("grad_norm",)),
    ("Speed", "per second", ("examples_per_second", "tokens_per_second")),
    ("Time of a step's parts", "s", ("gate_seconds", "dispatch_seconds", "experts_seconds", "combine_seconds")),
    ("Sent between ranks", "bytes", ("wire_bytes", "wire_bytes_across_nodes")),
)
"""Title, unit and numbers of the charts that come first; every other number has one further down."""

_MOST_PICTURE_BYTES = 2 * 2**20
_MOST_LAYERS = 12


def page(title: str, runs: Sequence[RunRecord], atlases: Mapping[str, Atlas | str]) -> str:
    """Return the page of ``runs`` and of ``atlases``, by the name of what they are of; or why there is none."""
    blocks = [f"<h1>{escape(title)}</h1>"]
    blocks += _metrics(runs)
    blocks += _training(runs)
    for run in runs:
        blocks += _section(f"Load of the experts: {run.name}", list(_load(run)), _LOAD_WORDS)
        blocks += _load_table(run)
    for name, atlas in atlases.items():
        heading = f"What each expert sees: {name}"
        if isinstance(atlas, str):
            blocks += [f"<h2>{escape(heading)}</h2>", f'<p class="small">{escape(atlas)}</p>']
        else:
            blocks += [*_section(heading, list(_atlas(atlas)), _atlas_words(atlas)), *_favourites(atlas)]
    blocks += _section("Pictures of the test", [picture for run in runs for picture in _pictures(run)])
    for run in runs:
        blocks += _about(run)
    body = "\n".join(blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _section(title: str, pictures: Sequence[str], words: str = "") -> list[str]:
    if not any(pictures):
        return []
    said = [f'<p class="small">{words}</p>'] if words else []
    return [f"<h2>{escape(title)}</h2>", *said, _grid(pictures)]


def _grid(pictures: Sequence[str]) -> str:
    return '<div class="charts">' + "".join(f"<div>{picture}</div>" for picture in pictures if picture) + "</div>"


def _metrics(runs: Sequence[RunRecord]) -> list[str]:
    """A table of test metrics: a column for each run, and for one run alone those of simple predictors."""
    columns: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        test = run.summary.get("test") or run.result.get("test")
        if isinstance(test, Mapping):
            columns[run.name] = test
            if len(runs) == 1:
                columns |= run.summary.get("baselines", {})
    names = list(dict.fromkeys(key for test in columns.values() for key, value in test.items() if _is_number(value)))
    if not names:
        return ['<p class="small">No run has ended: there are no test metrics yet.</p>'] if runs else []
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = [_row(key, [_shown(test.get(key)) for test in columns.values()]) for key in names]
    table = f'<div class="wide"><table><tr><th>test</th>{head}</tr>{"".join(rows)}</table></div>'
    return ["<h2>Metrics</h2>", table]


def _training(runs: Sequence[RunRecord]) -> list[str]:
    """Charts of what every run records and of validations; folded away, those of parts of the data, and all others."""
    pieces = [piece for run in runs for piece in (run, *run.stages)]
    validated = dict.fromkeys(key for piece in pieces for key in piece.validations)
    whole, _ = split_metrics(dict.fromkeys(validated, 0.0))
    of_parts = [key for key in validated if key not in whole]
    charted = {key for _, _, keys in _CHARTS for key in keys}
    groups: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for piece in pieces for key in piece.curves if key not in charted):
        groups.setdefault(key.rpartition("/")[0] or key, []).append(key)
    first = [_chart(title, unit, pieces, keys) for title, unit, keys in _CHARTS]
    first += [_validation(pieces, key) for key in validated if key not in of_parts]
    blocks = _section("Training", first)
    for summary, charts in (
        ("Validation, by parts of the data", [_validation(pieces, key) for key in of_parts]),
        ("Other numbers", [_chart(group, "", pieces, keys) for group, keys in groups.items()]),
    ):
        if any(charts):
            blocks.append(f"<details><summary>{summary}</summary>{_grid(charts)}</details>")
    return blocks


def _validation(pieces: Sequence[RunRecord], metric: str) -> str:
    found = [(i, piece) for i, piece in enumerate(pieces) if metric in piece.validations]
    lines = [_line(piece.name, piece.validations[metric], marked=True, colour=i) for i, piece in found]
    return line_chart(f"Validation: {metric}", "", lines, named=len(pieces) > 1)


def _chart(title: str, unit: str, pieces: Sequence[RunRecord], keys: Sequence[str]) -> str:
    return line_chart(title, unit, list(_lines(pieces, keys)), named=len(pieces) > 1 or len(keys) > 1)


def _lines(pieces: Sequence[RunRecord], keys: Sequence[str]) -> Iterator[Line]:
    """Yield lines of a chart: a colour for each piece and dashes for each key, or of one piece a colour for each key.

    So a piece has its colour in all charts. What is 0 throughout, or is the same as an earlier key, is left out.
    """
    for i, piece in enumerate(pieces):
        earlier: list[Curve] = []
        for j, key in enumerate(keys):
            curve = piece.curves.get(key)
            if curve is None or not np.any(curve.value_N) or any(map(curve.is_same, earlier)):
                continue
            earlier.append(curve)
            names = ([piece.name] if len(pieces) > 1 else []) + ([key] if len(keys) > 1 else [])
            colour, dash = (i, j) if len(pieces) > 1 else (j, 0)
            yield _line(": ".join(names) or key, curve, colour=colour, dash=dash)


def _line(label: str, curve: Curve, *, marked: bool = False, colour: int = 0, dash: int = 0) -> Line:
    thinned = curve.thinned()
    return Line(label, thinned.step_N, thinned.value_N, marked, colour, dash)


_LOAD_WORDS = (
    "A load is an expert's share of its layer's assignments times the number of experts: 1 is even, 0 is none. "
    "Layer by expert: the last tenth of the steps."
)


def _load(run: RunRecord) -> Iterator[str]:
    for piece in (run, *run.stages):
        steps, layers, experts = piece.load_NLE.shape
        if not steps:
            continue
        load_NLE = piece.load_NLE * (~np.isnan(piece.load_NLE)).sum(axis=2, keepdims=True)
        numbers = [str(i) for i in range(experts)]
        last_LE = load_NLE[-max(1, steps // 10) :].mean(axis=0)
        of = f": {piece.name}" if run.stages else ""
        yield heat_map(
            f"Load, layer by expert{of}",
            last_LE,
            [str(i) for i in range(layers)],
            numbers,
            axes=("MoE layer", "expert"),
            unit="load",
        )
        limits = (0.0, max(2.0, float(np.nanquantile(load_NLE, 0.99))))
        for layer in _spread(layers):
            yield heat_map(
                f"Load over time, layer {layer}{of}",
                load_NLE[:, layer].T,
                numbers,
                [f"{step:.0f}" for step in piece.load_step_N],
                axes=("expert", "step"),
                unit="load",
                limits=limits,
            )


def _load_table(run: RunRecord) -> list[str]:
    """A row for each MoE layer of the run, or of its last stage that has any."""
    piece = next((piece for piece in (*reversed(run.stages), run) if len(piece.load_NLE)), None)
    if piece is None:
        return []
    rows = []
    for layer, load_NE in enumerate(np.moveaxis(piece.load_NLE, 1, 0)):
        share_E = load_NE[-max(1, len(load_NE) // 10) :].mean(axis=0)
        share_E = share_E[~np.isnan(share_E)]
        effective = float(effective_experts(share_E))
        cells = [len(share_E), f"{effective:.1f}", int((share_E == 0).sum()), f"{share_E.max() * len(share_E):.2f}"]
        rows.append(_row(str(layer), cells))
    head = "<tr><th>MoE layer</th><th>experts</th><th>effective</th><th>without a token</th><th>largest load</th></tr>"
    words = "Effective experts: exp of the entropy of the load, the number of evenly used ones that are as diverse."
    return [f'<div class="wide"><table>{head}{"".join(rows)}</table></div><p class="small">{words}</p>']


def _atlas_words(atlas: Atlas) -> str:
    return (
        f"Of {atlas.examples:,} examples: the share of a kind's assignments that an expert gets. "
        "Rows that look alike: the experts do not tell these kinds apart."
    )


def _atlas(atlas: Atlas) -> Iterator[str]:
    names = list(atlas.layers)
    for place in _spread(len(names)):
        share_CE = atlas.layers[names[place]].share_CE
        numbers = [str(i) for i in range(share_CE.shape[1])]
        yield heat_map(names[place], share_CE, atlas.kinds, numbers, axes=("kind", "expert"), unit="share")


def _favourites(atlas: Atlas) -> list[str]:
    blocks = []
    names = list(atlas.layers)
    for name in (names[place] for place in _spread(len(names))):
        words = atlas.layers[name].favourites()
        if any(words):
            rows = [
                f"<tr><td>{expert}</td><td class=words>{escape('  ·  '.join(map(repr, of)))}</td></tr>"
                for expert, of in enumerate(words)
            ]
            table = f'<div class="wide"><table><tr><th>expert</th><th></th></tr>{"".join(rows)}</table></div>'
            blocks.append(f"<details><summary>Words of each expert, {escape(name)}</summary>{table}</details>")
    return blocks


def _pictures(run: RunRecord) -> Iterator[str]:
    room = _MOST_PICTURE_BYTES
    for path in sorted(run.root.glob("**/*.png")):
        data = path.read_bytes()
        room -= len(data)
        if room > 0:
            name = f"{run.name}: {path.relative_to(run.root)}"
            source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            yield f'<p class="small">{escape(name)}</p><img alt="{escape(name)}" src="{source}">'


def _about(run: RunRecord) -> list[str]:
    environment = run.environment
    lines = [f"<h2>About {escape(run.name)}</h2>"]
    if environment:
        command = shlex.join(map(str, environment.get("command", ())))
        packages = ", ".join(f"{name} {number}" for name, number in environment.get("packages", {}).items())
        device = environment.get("gpu") or f"{environment.get('processors')} CPU cores"
        words = f"{environment.get('world_size')} rank(s) on {device}; Python {environment.get('python')}; {packages}"
        lines += [f"<pre>{escape(command)}</pre>", f'<p class="small">{escape(words)}</p>']
    lines.append(f"<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>")
    return lines


def _spread(count: int) -> list[int]:
    """Return the numbers of at most 12 layers, evenly spread."""
    return sorted({int(place) for place in np.linspace(0, count - 1, min(count, _MOST_LAYERS))}) if count else []


def _row(name: str, cells: Sequence[Any]) -> str:
    return f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if not _is_number(value):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
