"""Every tutorial, followed word for word in an empty directory: its files saved, its commands given, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY

FOLDER = REPOSITORY / "docs/tutorials"
PAGES = sorted(page.stem for page in FOLDER.glob("*.md") if page.stem != "README")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED_AS = re.compile(r"save this as\s+`([\w.]+)`[^`]*\Z", re.IGNORECASE)
MINUTES_ALLOWED = 5
NEEDS = {"trainer": "accelerate", "graphs": "torch_geometric"}
"""Packages that a page asks its reader to install."""


def steps_of(text: str) -> Iterator[tuple[str | None, str]]:
    """(name of a file, its content) or (None, commands), in the order of the page."""
    end = 0
    for block in FENCED.finditer(text):
        named = SAVED_AS.search(text[end : block.start()])
        end = block.end()
        kind, content = block.groups()
        assert kind in ("", "python", "yaml"), f"who reads a block of {kind!r} does not know what to do with it"
        assert bool(kind) == bool(named), f"not said where this is to be saved: {content}"
        yield (named.group(1) if named else None), content


@pytest.mark.parametrize("name", PAGES)
def test_what_is_to_be_done_is_said(name: str) -> None:
    steps = list(steps_of((FOLDER / f"{name}.md").read_text(encoding="utf-8")))
    commands = "\n".join(content for file, content in steps if file is None)
    assert "dist-moe " in commands
    assert all(file in commands or file.removesuffix(".py") in commands for file, _ in steps if file)
    assert f"({name}.md)" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(60 * 4 * MINUTES_ALLOWED)
@pytest.mark.parametrize("name", PAGES)
def test_followed_word_for_word(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    programs = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    for file, content in steps_of((FOLDER / f"{name}.md").read_text(encoding="utf-8")):
        if file is not None:
            (tmp_path / file).write_text(content, encoding="utf-8")
            continue
        words = ["bash", "-euo", "pipefail", "-c", content]
        done = subprocess.run(words, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, f"{content}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
