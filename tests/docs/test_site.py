"""The site holds every page, its pictures are those of the source, and it builds without a warning."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY
from tools.build_site import INDEX, first_sentence, llms_txt, pages_below
from tools.draw_how_it_works import DRAWINGS, PICTURES, draw

PATTERNS = ("CHANGELOG.md", "docs/**/*.md", "examples/*.md", "results/**/*.md")
LISTED = re.compile(r"^- \[[^]]+\]\(_sources/(.+)\.txt\)", re.MULTILINE)
TEXT = re.compile(r"<text [^>]*>(.*?)</text>")
FROM_ELSEWHERE = re.compile(r"<(?:script|link|img)[^>]* (?:src|href)=\"(?:https?:)?//[^\"]*\"")


def test_every_page_is_in_the_table_of_contents_once() -> None:
    pages = {path for pattern in PATTERNS for path in REPOSITORY.glob(pattern)} - {INDEX}
    listed = [page for _, page in pages_below(INDEX)]
    assert len(pages) > 80
    assert sorted(listed) == sorted(pages)
    assert [page for page in listed if not page.read_text().startswith("# ")] == []


def test_llms_txt_names_every_page() -> None:
    text = llms_txt()
    assert text.startswith("# dist_moe\n\n> Distributed training of sparse mixtures of experts")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == re.findall(
        r"^:caption: (.*)$", INDEX.read_text(), re.MULTILINE
    )
    assert [REPOSITORY / page for page in LISTED.findall(text)] == [page for _, page in pages_below(INDEX)]
    page = "# A\n\n```\nb. C\n```\n\n| d |\n\nSee [e](f.md), v. 1.2.\nThen `g`. H\n"
    assert first_sentence(page) == "See e, v. 1.2."


def test_pictures_are_those_of_the_source(tmp_path: Path) -> None:
    """By their texts, which hold every number; the last digits of coordinates depend on the machine."""
    draw(tmp_path)
    page = (REPOSITORY / "docs/how_it_works.md").read_text()
    assert set(re.findall(r"\(how/(\w+)\.svg\)", page)) == set(DRAWINGS)
    assert {path.stem for path in PICTURES.iterdir()} == set(DRAWINGS)
    for name in DRAWINGS:
        drawn, kept = (TEXT.findall((folder / f"{name}.svg").read_text()) for folder in (tmp_path, PICTURES))
        assert len(kept) > 15
        assert drawn == kept, "run: python tools/draw_how_it_works.py"


@pytest.mark.slow
def test_it_builds_without_warnings_and_needs_no_network(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(REPOSITORY / "tools/build_site.py"), str(tmp_path / "site")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180
    site = tmp_path / "site"
    pages = {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}
    assert {name: found for name, text in pages.items() if (found := FROM_ELSEWHERE.findall(text))} == {}
    assert 'url=docs/index.html"' in pages["index.html"]
    listed = LISTED.findall((site / "llms.txt").read_text())
    assert [page for page in listed if not (site / "_sources" / f"{page}.txt").exists()] == []
    gates = pages["docs/api/gates.html"]
    assert 'id="dist_moe.gates.Comet"' in gates
    assert "evaluate with every split followed at 1/2" in gates  # the fields of settings
    assert 'href="routing.html#dist_moe.routing.Pairs"' in pages["docs/api/parallel.html"]  # a short name, resolved
