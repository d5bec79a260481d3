"""Reports: runs side by side, and what their experts see, as one HTML file that needs no server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_moe.config.files import replace_text
from dist_moe.errors import UserError
from dist_moe.report.atlas import Atlas, atlas_of_hugging_face, atlas_of_run
from dist_moe.report.page import page
from dist_moe.report.runs import read_run

REPORT = "report.html"


def report_of_runs(runs: Sequence[Path], output: Path, *, atlas: bool = True, allow_changed_data: bool = False) -> None:
    """Write the report of run directories to ``output``.

    ``atlas``: with what each expert sees, for which the weights and the data of each run are opened on this process.
    Raises UserError for what is no run, or is not intact, and if the page cannot be written.
    """
    names = _names(runs)
    records = [read_run(run, name) for run, name in zip(runs, names, strict=True)]
    atlases: dict[str, Atlas | str] = {}
    for run, name in zip(runs, names, strict=True) if atlas else ():
        try:
            atlases[name] = atlas_of_run(run, allow_changed_data=allow_changed_data)
        except UserError as error:  # no weights yet, many models, other data: the page says so
            atlases[name] = str(error)
    _write(output, page(", ".join(names), records, atlases))


def report_of_hugging_face(directory: Path, texts: Sequence[Path], output: Path) -> None:
    """Write what the experts of a transformers mixture see of text files to ``output``. Raises UserError."""
    name = directory.resolve().name
    _write(output, page(name, [], {name: atlas_of_hugging_face(directory, texts)}))


def _names(runs: Sequence[Path]) -> list[str]:
    """Return names that tell the runs apart: of the directory, with as many above it as that takes."""
    parts = [run.resolve().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise UserError("a run is named twice; name each once")
    depth = next(n for n in range(1, 99) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def _write(output: Path, text: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, text)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}; name another file") from error


__all__ = ["REPORT", "Atlas", "atlas_of_hugging_face", "atlas_of_run", "report_of_hugging_face", "report_of_runs"]
