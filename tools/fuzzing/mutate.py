"""Odd files and odd values: what people, disks and other programs make of good ones."""

from __future__ import annotations

import copy
import gzip
import os
import random
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD_BYTES = (b"\0", b"\r", b"\n", b"\r\n", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"'", b",", b"::", b"\t", b"\\")


def words(text: str) -> tuple[str, ...]:
    """Return what spaces part."""
    return tuple(text.split(" "))


ODD_CELLS = (
    *words('nan NaN inf -inf 1e308 1e309 -1 0 00001 1.5 6 5.0 5.5 1e0 1_0 +5 -0 null None true a,b " "a a" ::'),
    *("", " ", "\t", "\0", "\uff15", "\u0663", "\u2028", "\u00e9", "\U0001f642", "a" * 200_000),
    *("9" * 19, "9" * 30, "9" * 5000, str(2**53 + 1), str(2**63 - 1), str(2**63)),
)
_ODD_NUMBERS = (0, 1, -1, 2, 1.5, -0.0, 1e308, 1e-320, 2**24 + 1, 2**31, 2**63 - 1, 2**63, 10**30, 10**4000)
_ODD_TEXTS = ("", "x", "1", "nan", "\0", "\ud800", "../x", "/etc/passwd", "a" * 100_000)
_ODD_SECTIONS: tuple[Any, ...] = ([], [1], ["x"], [[]], {}, {"x": 1}, {"type": "yarn"}, {"name": "x"})
ODD_VALUES = (None, True, False, float("inf"), float("nan"), *_ODD_NUMBERS, *_ODD_TEXTS, *_ODD_SECTIONS)


def odd_file(path: Path, drawn: random.Random) -> str:
    """Put something else in the place of a file; return what."""
    kinds: list[tuple[str, Callable[[], object]]] = [
        ("missing", lambda: None),
        ("empty", lambda: path.write_bytes(b"")),
        ("a directory", path.mkdir),
        ("a pipe", lambda: os.mkfifo(path)),
        ("a socket", lambda: _socket(path)),
        ("a link to nothing", lambda: path.symlink_to("nothing")),
        ("a link to itself", lambda: path.symlink_to(path.name)),
        ("a link to an endless device", lambda: path.symlink_to("/dev/zero")),
        ("a link to a directory", lambda: path.symlink_to("/")),
    ]
    what, make = drawn.choice(kinds)
    path.unlink()
    make()
    return f"{path.name} is {what}"


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        before = Path.cwd()
        os.chdir(path.parent)  # such addresses are short
        try:
            made.bind(path.name[:60])
        finally:
            os.chdir(before)


def odd_bytes(path: Path, drawn: random.Random) -> str:
    """Change the bytes of a file; return how."""
    content = path.read_bytes()
    packed = content.startswith(b"\x1f\x8b") and drawn.random() < 0.7
    if packed:
        content = gzip.decompress(content)
    at, length = drawn.randrange(len(content) + 1), drawn.choice([1, 2, 7, 100])
    odd = drawn.choice(ODD_BYTES) * drawn.choice([1, 1, 1, 3, 1000])
    ways: dict[str, Callable[[], bytes]] = {
        "a bit flipped": lambda: flipped(content, drawn),
        "bytes removed": lambda: content[:at] + content[at + length :],
        "bytes added": lambda: content[:at] + odd + content[at:],
        "bytes replaced": lambda: content[:at] + odd + content[at + len(odd) :],
        "a piece twice": lambda: content[:at] + content[max(0, at - length) :],
        "cut short": lambda: content[:at],
        "noise": lambda: drawn.randbytes(drawn.choice([1, 50, 5000])),
        "UTF-16": lambda: content.decode("latin-1").encode(
            drawn.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
        ),
        "carriage returns alone": lambda: content.replace(b"\r\n", b"\r").replace(b"\n", b"\r"),
        "a byte order mark before it": lambda: b"\xef\xbb\xbf" + content,
        "only its first line": lambda: content.split(b"\n", 1)[0] + b"\n",
        "twice": lambda: content + content,
        "packed": lambda: gzip.compress(content),
    }
    what = drawn.choice(list(ways))
    changed = ways[what]()
    path.write_bytes(gzip.compress(changed) if packed else changed)
    return f"{path.name}: {what} at {at} of {len(content)}"


def flipped(content: bytes, drawn: random.Random) -> bytes:
    """Return the content with one bit of another value; empty content as it is."""
    if not content:
        return content
    changed = bytearray(content)
    changed[drawn.randrange(len(changed))] ^= 1 << drawn.randrange(8)
    return bytes(changed)


def odd_cell(path: Path, drawn: random.Random, separator: str, encoding: str = "utf-8") -> str:
    """Change a cell or a line of a table, packed or not; return how."""
    content = path.read_bytes()
    packed = path.suffix == ".gz"
    lines = (gzip.decompress(content) if packed else content).decode(encoding).split("\n")
    line = drawn.randrange(max(1, len(lines) - 1)) if drawn.random() < 0.8 else 0
    cells = lines[line].split(separator)
    at, odd = drawn.randrange(len(cells)), drawn.choice(ODD_CELLS)
    ways: dict[str, Callable[[], str]] = {
        f"cell {at} is {odd[:30]!r}": lambda: separator.join([*cells[:at], odd, *cells[at + 1 :]]),
        f"cell {at} is missing": lambda: separator.join([*cells[:at], *cells[at + 1 :]]),
        f"cell {at} is there twice": lambda: separator.join([*cells[: at + 1], *cells[at:]]),
        "is there twice": lambda: f"{lines[line]}\n{lines[line]}",
        "is another": lambda: drawn.choice(lines),
    }
    names = list(ways)
    what = names[0] if drawn.random() < 0.6 else drawn.choice(names)
    lines[line] = ways[what]()
    changed = "\n".join(lines).encode(encoding, "replace")
    path.write_bytes(gzip.compress(changed) if packed else changed)
    return f"{path.name}, line {line + 1}: {what}"


def odd_json(content: Any, drawn: random.Random) -> tuple[Any, str]:
    """Return a copy of what JSON holds with one value changed, and how."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    holder, key, name = drawn.choice(places)
    way = drawn.random()
    if way < 0.15:
        del holder[key]
        return content, f"{name} is missing"
    if way < 0.2 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
        return content, f"{name} has another name"
    value = holder[key]
    if way < 0.35 and type(value) in (int, float):
        odd = drawn.choice([-value, value + 1, value * 2, str(value), float(value), [value], value * 10**9])
    else:
        odd = drawn.choice(ODD_VALUES)
    holder[key] = copy.deepcopy(odd)
    return content, f"{name} is {_brief(odd)}"


def _brief(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "a long number"
    return repr(value)[:60]


def _places(content: Any, name: str = "") -> Any:
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(entries):
        yield content, key, f"{name}.{key}"
        yield from _places(value, f"{name}.{key}")


def copied(source: Path, target: Path) -> Path:
    """Copy the content of a directory into another, which is there; links, pipes and sockets stay such. Return that."""

    def copy(path: str, to: str) -> None:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        if kind in (stat.S_IFIFO, stat.S_IFSOCK):
            os.mknod(to, kind | 0o600)
        else:
            shutil.copy2(path, to, follow_symlinks=False)

    shutil.copytree(source, target, dirs_exist_ok=True, symlinks=True, copy_function=copy)
    return target
