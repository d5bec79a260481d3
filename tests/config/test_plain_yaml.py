"""YAML as it is read and written everywhere: 1.2's plain values, once each, within limits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_moe.config.plain_yaml import DEPTH_LIMIT, NODE_LIMIT, SIZE_LIMIT, parse_yaml, read_yaml, yaml_text
from dist_moe.errors import UserError

# By YAML 1.2.2, section 10.3.2, wherever they stand; the last line is what YAML 1.1 reads otherwise.
VALUES: dict[str, Any] = (
    {"1e-3": 0.001, "1E5": 100000.0, ".5": 0.5, "5.": 5.0, "+1.5e+3": 1500.0, "-0.0": -0.0, "0e9": 0.0}
    | {"0o17": 15, "0x1F": 31, "0777": 777, "+7": 7, "-0": 0, "1" + "0" * 300: 10**300}
    | {".inf": math.inf, "-.INF": -math.inf, "true": True, "FALSE": False, "~": None, "Null": None, "": None}
    | {text: text for text in ["yes", "No", "on", "OFF", "y", "1:30", "1_000", "0b11", "2020-01-01", "2020-99-99", "="]}
)


@pytest.mark.parametrize(("text", "value"), VALUES.items())
def test_plain_values_are_those_of_yaml_1_2_wherever_they_stand(text: str, value: Any) -> None:
    written = f"a: {text}\nb: [{text or '~'}]\nc: {{d: {text}}}\ne:\n- {text}\n"
    read = parse_yaml(written, "it")
    found = [read["a"], read["b"][0], read["c"]["d"], read["e"][0], parse_yaml(text, "it")]
    assert [(one, type(one)) for one in found] == [(value, type(value))] * 5
    assert all(math.copysign(1, one) == math.copysign(1, value) for one in found if isinstance(one, float))


# text, line and column, a word of the message
REFUSED = {
    "twice": ("train:\n  seed: 1\nmodel: 2\ntrain: 3\n", "line 4, column 1", "stands already in line 1"),
    "twice below": ("a: {b: 1, c: 2, b: 1}", "line 1, column 17", "the key b"),
    "twice, in two notations": ("1: a\n0x1: b", "line 2, column 1", "stands already"),
    "int": ("a: !!int abc", "line 1, column 4", "the tag !!int"),
    "binary": ("a: !!binary aGk=", "line 1, column 4", "the tag !!binary"),
    "timestamp": ("a: !!timestamp 2020-99-99", "line 1, column 4", "the tag !!timestamp"),
    "set": ("a: !!set {b, c}", "line 1, column 4", "the tag !!set"),
    "python": ("a: !!python/object/apply:os.system [ls]", "line 1, column 4", "the tag !!python"),
    "own": ("a: !mine 3", "line 1, column 4", "the tag !mine"),
    "digits": (f"a: {'9' * 4301}", "line 1, column 4", "larger than any"),
    "hexadecimal": (f"a: 0x{'f' * 4301}", "line 1, column 4", "larger than any"),
    "beyond floats": (f"a: {'9' * 309}", "line 1, column 4", "larger than any"),
    "overflow": ("a: 1e999", "line 1, column 4", "larger than any float"),
    "underflow": ("a: 1e-999", "line 1, column 4", "smaller than any float"),
    "documents": ("a: 1\n---\na: 2", "line 2, column 1", "second document"),
    "tab": ("a:\n\tb: 1", "line 2, column 1", "spaces"),
    "raw NUL": ("a: 1\nb: \0", "line 2, column 4", "U+0000"),
    "NUL": ('a: "\\0"', "line 1, column 4", "NUL"),
    "surrogate": ('a: "\\ud800"', "line 1, column 4", "half a character"),
    "truth as key": ("true: 1", "line 1, column 1", "'true'"),
    "null as key": ("a: 1\n~: 1", "line 2, column 1", "'~'"),
    "list as key": ("? [a]\n: 1", "line 1, column 3", "cannot be a key"),
    "merged text": ("<<: a", "line 1, column 5", "merges mappings"),
    "no anchor": ("a: *b", "line 1, column 4", "no anchor &b"),
    "itself": ("a: &a [*a]", "line 1, column 8", "no anchor &a"),
    "open": ("a: [1, 2", "line 1, column 9", "expected"),
    "lists": ("[" * 500, f"line 1, column {DEPTH_LIMIT + 1}", "inside one another"),
    "dashes": ("- " * 500, f"line 1, column {2 * DEPTH_LIMIT + 1}", "inside one another"),
    "values": ("- a\n" * (NODE_LIMIT + 1), f"line {NODE_LIMIT}", "more than"),
    "laughs": ("a: &a [x, x]\n" + "".join(f"{i}: &a [*a, *a]\n" for i in range(40)), "line 1", "more than"),
    "tower": ("a: &a [x]\n" + "".join(f"{i}: &a [*a]\n" for i in range(50)), "line 40", "inside one another"),
}


@pytest.mark.parametrize(("text", "place", "word"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_named_with_its_place(text: str, place: str, word: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_yaml(text, "it")
    message = str(refusal.value)
    assert place in message
    assert word in message
    assert len(message) < 300


def test_text_in_the_escapes_of_json() -> None:
    text = 'é漢\U0001f600"\\/\t'
    assert parse_yaml(json.dumps(text), "it") == text


def test_aliases_and_merged_keys_are_copies() -> None:
    content = parse_yaml("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}\nd: {<<: [{x: 4}, *a]}", "it")
    content["b"]["y"].append(5)
    assert content == {
        "a": {"x": 1, "y": [2]},
        "b": {"x": 1, "y": [2, 5]},
        "c": {"x": 3, "y": [2]},
        "d": {"x": 4, "y": [2]},
    }


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a: 1\nb: \xe9\n", ["line 2, column 4", "0xe9", "UTF-8"]),
        ("a: 1".encode("utf-16"), ["line 1, column 1", "UTF-8"]),
        (b"#" * (SIZE_LIMIT + 1), ["larger than 1,000,000 bytes"]),
        (b"- 1", ["pairs, not a list"]),
    ],
)
def test_files_that_are_refused(tmp_path: Path, data: bytes, words: list[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError) as refusal:
        read_yaml(path, "sweep")
    assert all(word in str(refusal.value) for word in [f"sweep {path}", *words])


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs an endless file")
def test_what_may_never_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(UserError, match="not a regular file"):
            read_yaml(path)


def test_what_a_shell_gives_is_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"a: 1e-3")
    os.close(writing)
    try:
        assert read_yaml(Path(f"/dev/fd/{reading}")) == {"a": 1e-3}
    finally:
        os.close(reading)


def test_a_file_at_the_limits_is_read_soon() -> None:
    begin = time.process_time()
    assert len(parse_yaml("- a\n" * (NODE_LIMIT - 1), "it")) == NODE_LIMIT - 1
    assert len(parse_yaml(f"a: '{'x' * (SIZE_LIMIT - 10)}'", "it")["a"]) == SIZE_LIMIT - 10
    assert time.process_time() - begin < 30  # 10 MB of lists once took 100 s


def test_read_as_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("\ufeffname: é漢\n".encode())
    program = (
        "from pathlib import Path; from dist_moe.config.plain_yaml import read_yaml;"
        "print(ascii(read_yaml(Path('a.yaml'))))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.decode().strip() == ascii({"name": "é漢"}), done.stderr.decode()


TRICKY = st.sampled_from(
    [
        *VALUES,
        *("null", "<<", "1.5", "0x", "0o8", ".", "-", "1e", "!a", "&a", "*a", "# a", "a: b", "- a", "%", "---", "'"),
    ]
)
TEXTS = TRICKY | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
INTEGERS = st.integers() | st.integers(-(10**300), 10**300)
SCALARS = st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | TEXTS
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | INTEGERS, inner, max_size=4)
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(PLAIN)
@example({text: [text, value] for text, value in VALUES.items()})
@example(["line\nline\n", " a", "a ", "\ta", "x" * 300, "a\u2028b\x85c\r", "\ufeff"])
def test_what_is_written_is_read_back_as_the_same_values(content: Any) -> None:
    for flow in (False, True):
        written = yaml_text(content, flow=flow)
        assert written.isascii()
        assert repr(parse_yaml(written, "it")) == repr(content)  # 1, 1.0, True and -0.0 differ
    assert repr(yaml.safe_load(yaml_text(content))) == repr(content)  # other people's readers are of YAML 1.1
