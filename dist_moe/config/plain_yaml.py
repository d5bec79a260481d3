"""YAML 1.2 of plain values: the only reader and the only writer of it.

What is read is None, bool, int, float, text, lists and mappings of these, by the core schema of YAML 1.2.2. Wherever
they stand, ``1e-3`` and ``.5`` are numbers, ``0o17`` is 15, ``yes``, ``1:30``, ``1_000`` and ``2020-01-01`` are text.
Anchors, aliases and merge keys (``<<``) work. Tags, repeated keys, a second document, and numbers that no float can
hold are refused, and so is what is too large or too deep for a configuration.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dist_moe.config.files import check_regular
from dist_moe.errors import UserError, shown

Content = dict[str, Any]

SIZE_LIMIT = 1_000_000
"""Bytes of a file."""

NODE_LIMIT = 50_000
"""Values and keys of a file, those of aliases counted wherever they are used: a billion laughs end here."""

DEPTH_LIMIT = 40
"""Lists and mappings inside one another."""

_WORDS = dict.fromkeys(("", "~", "null", "Null", "NULL"), None) | {
    word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")
}
_INTEGER = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF))\Z")
_NAN = re.compile(r"\.(?:nan|NaN|NAN)\Z")
_LARGEST = int(sys.float_info.max)
_LARGEST_DIGITS = 320
"""No integer of more digits is below the largest float; and Python does not read one of 4,300."""

_MERGE = object()
_TOO_DEEP = f"more than {DEPTH_LIMIT} lists and mappings inside one another"


def read_yaml(path: Path, kind: str = "configuration") -> Content:
    """Return the mapping in a UTF-8 file, empty if the file is. ``kind``: the noun by which messages call the file.

    Raises UserError if it cannot be read, is not YAML as this module reads it, or not a mapping.
    """
    try:
        if path.parent != Path("/dev/fd"):  # where a shell puts what a command of its own gives
            check_regular(path)
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise UserError(f"{kind} {path} cannot be read: {error.strerror}") from error
    if len(data) > SIZE_LIMIT:
        raise UserError(f"{kind} {path} is larger than {SIZE_LIMIT:,} bytes: it is another file, or holds data")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig")
        place, byte = _place(before, len(before)), data[error.start]
        raise UserError(f"{kind} {path} is not YAML in UTF-8: {place}: byte 0x{byte:02x}; save it as UTF-8") from error
    content = parse_yaml(text, f"{kind} {path}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{kind} {path} must hold 'key: value' pairs, not a {type(content).__name__}")
    return content


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a YAML text, None if it is empty. ``source``: what messages call it.

    Raises UserError with line and column of what is not YAML, or not as this module reads it.
    """
    return copy.deepcopy(_parsed(text, source))  # a run reads the same few files many times, and a caller may change it


@lru_cache(maxsize=32)
def _parsed(text: str, source: str) -> Any:
    try:
        return _Reader(text, source).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        hint = "; indent with spaces" if "'\\t'" in what else ""
        raise UserError(f"{source} is not YAML: {place}{what}{hint}") from error
    except yaml.reader.ReaderError as error:
        place = _place(text, error.position)
        raise UserError(
            f"{source} is not YAML: {place}: the character U+{ord(text[error.position]):04X} may not stand in it"
        ) from error


def yaml_text(content: Any, *, flow: bool = False) -> str:
    """Return plain values as YAML that :func:`parse_yaml`, and readers of YAML 1.1, read as the same values.

    ``flow``: in one line, as the value of an override.
    """
    width = math.inf if flow else None
    return str(yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=width))


class _Reader:
    """Builds the value of one document from PyYAML's events."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._anchored: dict[str, tuple[Any, int]] = {}
        self._nodes = 0

    def document(self) -> Any:
        """Return the value of the only document, None if there is none."""
        next(self._events)  # the start of the stream
        first = next(self._events)
        if isinstance(first, yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), 0)
        next(self._events)  # the end of the document
        after = next(self._events)
        if not isinstance(after, yaml.StreamEndEvent):
            self._refuse(after, "a second document begins; keep one")
        return value

    def _value(self, event: Any, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        before = self._nodes
        self._count(event, 1)
        if depth >= DEPTH_LIMIT and not isinstance(event, yaml.ScalarEvent):
            self._refuse(event, _TOO_DEEP)
        if event.tag not in (None, "!"):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._refuse(event, f"the tag {tag} is not read; leave it out, and put text that is no text into quotes")
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = [self._value(entry, depth + 1) for entry in self._until(yaml.SequenceEndEvent)]
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self._anchored[event.anchor] = value, self._nodes - before
        return value

    def _alias(self, event: Any, depth: int) -> Any:
        if event.anchor not in self._anchored:
            self._refuse(event, f"*{event.anchor} has no anchor &{event.anchor} that ends before it")
        value, nodes = self._anchored[event.anchor]
        self._count(event, nodes)
        if depth + _height(value) > DEPTH_LIMIT:
            self._refuse(event, _TOO_DEEP)
        return copy.deepcopy(value)  # an override of one must not change the other

    def _mapping(self, depth: int) -> Content:
        content: Content = {}
        lines: dict[Any, int] = {}
        merged: list[Content] = []
        for start in self._until(yaml.MappingEndEvent):
            key = self._key(start)
            if key in lines:
                name = "<<" if key is _MERGE else key
                self._refuse(start, f"the key {name} stands already in line {lines[key]}; keep one of them")
            lines[key] = start.start_mark.line + 1
            following = next(self._events)
            value = self._value(following, depth + 1)
            if key is not _MERGE:
                content[key] = value
                continue
            merged = value if isinstance(value, list) else [value]
            if not all(isinstance(one, dict) for one in merged):
                self._refuse(following, "<< merges mappings only, such as <<: *anchor")
        for one in merged:
            content = content | {name: value for name, value in one.items() if name not in content}
        return content

    def _key(self, event: Any) -> Any:
        if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
            return _MERGE
        if isinstance(event, yaml.CollectionStartEvent):
            self._refuse(event, "a list or a mapping cannot be a key")
        key = self._value(event, 0)
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            self._refuse(
                event, f"the key {shown(event.value)} is neither a text nor a whole number; put it into quotes"
            )
        return key

    def _scalar(self, event: Any) -> Any:
        text = event.value
        if not event.implicit[0]:
            try:  # JSON, which YAML 1.2 includes, writes a character beyond the first 65,536 as two escapes
                text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            except UnicodeDecodeError:
                self._refuse(event, f"the text {shown(text)} holds half a character")
            if "\0" in text:
                self._refuse(event, f"the text {shown(text)} holds NUL, which no name of a file can")
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.match(text):
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            if len(text.lstrip("+-0")) <= _LARGEST_DIGITS and abs(number := int(text, base)) <= _LARGEST:
                return number
            self._refuse(event, f"the number {shown(text)} is larger than any that is computed with")
        if _FLOAT.match(text):
            value = float(text.lower().replace(".inf", "inf"))
            if math.isinf(value) != (text[-1] in "fF"):
                self._refuse(event, f"the number {shown(text)} is larger than any float; infinity is .inf")
            if value == 0 and re.match(r"[-+.0]*[1-9]", text):
                self._refuse(event, f"the number {shown(text)} is smaller than any float")
            return value
        return math.nan if _NAN.match(text) else text

    def _until(self, end: type[Any]) -> Iterator[Any]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _count(self, event: Any, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > NODE_LIMIT:
            self._refuse(event, f"more than {NODE_LIMIT:,} values, those of aliases counted wherever they are used")

    def _refuse(self, event: Any, message: str) -> NoReturn:
        mark = event.start_mark
        raise UserError(f"{self._source}: line {mark.line + 1}, column {mark.column + 1}: {message}")


def _height(value: Any) -> int:
    """Return how many lists and mappings stand inside one another in ``value``, itself included."""
    if not isinstance(value, (list, dict)):
        return 0
    return 1 + max(map(_height, value.values() if isinstance(value, dict) else value), default=0)


def _place(text: str, position: int) -> str:
    line = text.count("\n", 0, position) + 1
    return f"line {line}, column {position - text.rfind(chr(10), 0, position)}"


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes text that YAML 1.1 reads as something else, and text that YAML 1.2 does."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: a file is to be read by people, section by section."""
        return True


for _tag, _pattern in (("int", _INTEGER), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list("-+.0123456789"))
