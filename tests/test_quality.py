"""The code is as it is said to be: formatted, typed, on its floors, and documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

REPOSITORY = Path(__file__).parents[1]
MODULES = [path for root in ("dist_moe", "launch") for path in sorted((REPOSITORY / root).rglob("*.py"))]
TOOLS = sorted((REPOSITORY / "tools").rglob("*.py"))
LONGEST_FILE, FULLEST_FOLDER = 400, 20


@pytest.mark.parametrize(
    "command",
    ["ruff check .", "ruff format --check .", "mypy", "lint-imports"],
)
def test_checkers_have_nothing_to_say(command: str) -> None:
    program, *arguments = command.split()
    done = subprocess.run(
        [Path(sys.executable).parent / program, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def public(nodes: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def definitions(nodes: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """Yield public classes, functions and methods; what is defined within functions does not count."""
    for node in public(nodes):
        yield node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body)


DOCUMENTED = 0.95
"""Share of public classes, functions and methods that have a docstring."""

DOCUMENTED_BLOCKS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NEEDS_ITS_NEIGHBOURS = re.compile(r"(Of|What|The same|As|Whether what)\b")


def test_what_is_public_is_documented() -> None:
    trees = {name_of(path): ast.parse(path.read_text()) for path in MODULES if path.read_text().strip()}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []
    found = [(name, node) for name, tree in trees.items() for node in definitions(tree.body)]
    bare = [f"{name}: {node.name}" for name, node in found if not ast.get_docstring(node)]
    assert [one for one in bare if one.partition(": ")[2][0].isupper()] == []  # every class has one
    assert len(bare) <= (1 - DOCUMENTED) * len(found), "\n".join(bare)


def test_docstrings_are_understood_without_their_neighbours() -> None:
    """Those of modules, classes, functions and constants, of the package and of the tools."""
    lame = [
        f"{name_of(path)}:{statement.lineno}: {text.splitlines()[0]}"
        for path in [*MODULES, *TOOLS]
        for node in ast.walk(ast.parse(path.read_text()))
        for statement in (node.body if isinstance(node, DOCUMENTED_BLOCKS) else [])
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(text := statement.value.value, str)
        and NEEDS_ITS_NEIGHBOURS.match(text.strip())
    ]
    assert lame == []


def is_text_in_the_locale(call: ast.Call) -> bool:
    """Whether a call opens a file, or another program's output, as text without saying in which encoding.

    Methods ``open`` of tasks, archives and the like are told by their arguments.
    """
    function, given = call.func, {keyword.arg for keyword in call.keywords}
    name = getattr(function, "attr", getattr(function, "id", ""))
    if "encoding" in given:
        return False
    if name in ("run", "Popen", "check_output", "check_call"):
        return not given.isdisjoint({"text", "universal_newlines"})
    if name in ("open", "fdopen"):
        modes = call.args[isinstance(function, ast.Name) or name == "fdopen" :]
        if not modes:
            return given <= {"newline", "errors", "buffering"} and (bool(call.args) or name == "open")
        mode = getattr(modes[0], "value", None)
        return isinstance(mode, str) and len(mode) <= 3 and "b" not in mode
    return name in ("read_text", "write_text") or (name == "TextIOWrapper" and len(call.args) < 2)


def test_text_is_utf_8_whatever_the_locale() -> None:
    calls = [
        f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}"
        for path in [*MODULES, *TOOLS]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and is_text_in_the_locale(node)
    ]
    assert calls == []


def test_yaml_is_read_and_written_in_one_place() -> None:
    importing = [
        name_of(path) for path in [*MODULES, *TOOLS] if re.search(r"^ *(import|from) yaml\b", path.read_text(), re.M)
    ]
    assert importing == ["dist_moe/config/plain_yaml.py"]


def test_no_folder_is_too_full() -> None:
    files = Counter(path.parent for path in MODULES)
    assert {name_of(folder): count for folder, count in files.items() if count > FULLEST_FOLDER} == {}


def imported_at_once(tree: ast.Module, names: set[str]) -> Iterator[str]:
    """Yield the modules of ours that a module imports when it is imported itself."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in names else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_there_is_no_import_circle() -> None:
    """Between modules; a package stands for its __init__."""
    dotted = {str(path.relative_to(REPOSITORY).with_suffix("")).replace("/", "."): path for path in MODULES}
    dotted = {name.removesuffix(".__init__"): path for name, path in dotted.items()}
    graph = networkx.DiGraph()
    for name, path in dotted.items():
        imported = imported_at_once(ast.parse(path.read_text()), set(dotted))
        # A package whose parts import one another through it would be a circle of its own making.
        graph.add_edges_from((name, other) for other in imported if other in dotted and other != name)
    assert [sorted(part) for part in networkx.strongly_connected_components(graph) if len(part) > 1] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
