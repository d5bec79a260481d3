"""The configurations that the package brings along, also where there is no repository around it."""

from __future__ import annotations

import difflib
from pathlib import Path
from textwrap import shorten

from dist_moe.errors import UserError

MARK = "@"
SHOWN_CHARACTERS = 90
CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def config_path(text: str | Path, directory: Path | None = None) -> Path:
    """Return the file of a configuration: ``text`` itself, or for @NAME the one of that name that the package has.

    ``directory``: to which a path is relative; None is the working directory. Raises UserError for a NAME that the
    package does not have.
    """
    name = str(text)
    if not name.startswith(MARK):
        return (directory or Path()) / text
    known = packaged_configs()
    if name.removeprefix(MARK) not in known:
        near = difflib.get_close_matches(name.removeprefix(MARK), known, n=1)
        hint = f"did you mean {MARK}{near[0]}? " if near else ""
        raise UserError(
            f"{name}: the package has no configuration of that name; {hint}'dist-moe config --list' shows them all "
            f"(a file of that name: ./{name})"
        )
    return CONFIGS / f"{name.removeprefix(MARK)}.yaml"


def packaged_configs() -> list[str]:
    """Return the names of the configurations that the package has, those of sweeps as ``sweeps/NAME``."""
    return sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


def packaged_listing() -> str:
    """Return a line for each configuration that the package has: its @NAME, and how its comment begins."""
    names = packaged_configs()
    width = max(map(len, names)) + len(MARK)
    heads = ((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0] for name in names)
    said = (shorten(head.lstrip("# "), SHOWN_CHARACTERS, placeholder=" ...") for head in heads)
    return "\n".join(f"{MARK + name:{width}}  {text}" for name, text in zip(names, said, strict=True))
