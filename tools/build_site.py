"""Build the documentation site with Sphinx: HTML pages, an API reference from docstrings, and llms.txt.

    pip install -e '.[docs]' -c constraints.txt
    python tools/build_site.py [DIRECTORY]          # build/site; no network is needed

A warning, such as a link to nothing or a page outside the table of contents, ends it with code 1.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
INDEX = REPOSITORY / "docs/index.md"
TOCTREE = re.compile(r"^:::\{toctree\}\n(.*?)^:::", re.MULTILINE | re.DOTALL)
HOME = (
    '<!doctype html><meta charset="utf-8"><title>dist_moe</title><meta http-equiv="refresh" content="0; url={page}">\n'
)


def pages_below(page: Path) -> Iterator[tuple[str, Path]]:
    """Yield (caption, page) of every page in the tables of contents of ``page`` and below, in their order."""
    for block in TOCTREE.findall(page.read_text(encoding="utf-8")):
        caption = re.search(r"^:caption: (.*)$", block, re.MULTILINE)
        for entry in re.findall(r"^[^:\s].*$", block, re.MULTILINE):
            for found in sorted(page.parent.glob(f"{entry}.md")):
                child = Path(os.path.normpath(found))
                yield caption[1] if caption else "", child
                yield from (("", below) for _, below in pages_below(child))


def first_sentence(text: str) -> str:
    """Return the first sentence of a page's first paragraph of prose, without links; empty if it has none."""
    body = re.sub(r"^(```|:::).*?^\1\n", "", text.partition("\n")[2], flags=re.MULTILINE | re.DOTALL)
    prose = next((part for part in body.split("\n\n") if re.match(r"\n*[\w*`\[(]", part)), "")
    plain = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", " ".join(prose.split()))
    return re.split(r"(?<=[.?])\s(?=[A-Z`])", plain)[0]


def llms_txt() -> str:
    """Return llms.txt (llmstxt.org): what this is, and each page as Markdown with its first sentence."""
    lines = ["# dist_moe", "", f"> {first_sentence(INDEX.read_text(encoding='utf-8'))}"]
    for caption, page in pages_below(INDEX):
        text = page.read_text(encoding="utf-8")
        title, about = text.partition("\n")[0].removeprefix("# "), first_sentence(text)
        if caption and f"## {caption}" not in lines:
            lines += ["", f"## {caption}", ""]
        place = f"_sources/{page.relative_to(REPOSITORY)}.txt"
        lines.append(f"- [{title}]({place})" + (f": {about}" if about else ""))
    return "\n".join(lines) + "\n"


def build(output: Path) -> int:
    """Write the site to ``output`` and return Sphinx's exit code."""
    from sphinx.cmd.build import build_main

    doctrees = output.with_name(f"{output.name}-doctrees")
    options = ["-b", "html", "-W", "-n", "--keep-going", "-q", "-c", str(REPOSITORY / "docs"), "-d", str(doctrees)]
    code = build_main([*options, str(REPOSITORY), str(output)])
    if code == 0:
        (output / "index.html").write_text(HOME.format(page="docs/index.html"), encoding="utf-8")
        (output / "llms.txt").write_text(llms_txt(), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else REPOSITORY / "build/site")))
