"""Each format that packages have text in, on tiny files made here."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import pytest

from dist_moe.data.text import formats
from dist_moe.data.text.brown import running_text
from dist_moe.data.text.domains import read_code, read_manuals
from dist_moe.data.text.formats import character_vectors
from tests.data.packing import write_debian_package, write_wheel


@pytest.mark.parametrize(
    ("tagged", "text"),
    [
        ("The/at jury/nn said/vbd ,/, ``/`` no/at ''/'' ./.", 'The jury said, "no".'),
        ("\n\n\tOne/cd ./.\nTwo/cd ?/. ?/.\n\n\n\tThree/cd (/( 1/2/cd )/) !/. !/.", "One. Two?\nThree (1/2)!"),
        ("it/pps is/bez '/' so/rb '/' --/-- and/cc '/' not/* '/' ./.", "it is 'so' -- and 'not'."),
        ("Allen/np Jr./np ./.\nHe/pps ;/. ;/. 5/cd %/nn", "Allen Jr. He; 5 %"),
        ("Merger/nn-hl proposed/vbn-hl\nHowever/wrb ,/, no/at ./.", "Merger proposed\nHowever, no."),
    ],
)
def test_brown_text_runs_again(tagged: str, text: str) -> None:
    assert running_text(tagged) == text


def test_osis_without_notes_and_numbers() -> None:
    book = (
        '<title>Preface</title><div canonical="true" sID="a" type="book"/><title level="1">Genesis</title> '
        '<div sID="g" type="x-p"/><chapter n="1" osisID="Gen.1" sID="Gen.1"/><w lemma="strong:H1">In</w> '
        '<w lemma="x">God</w><note placement="foot">a <rdg>note</rdg></note><w>created</w> &amp; <w>so</w>'
        '<note>n</note>, <l level="1" sID="l"/>a line<l eID="l"/><chapter eID="Gen.1"/>'
        '<chapter n="2" osisID="Gen.2" sID="Gen.2"/>Second.<chapter eID="Gen.2"/>'
    )
    expected = [("Gen.1", "Genesis\nIn God created & so,\na line"), ("Gen.2", "Second.")]
    assert list(formats.chapters(book)) == expected
    packed = zlib.compress(book.encode())
    assert list(formats.books(struct.pack("<III", 3, len(packed), len(book)), b"..." + packed)) == [book]
    assert list(formats.chapters("<title>Only front matter</title>")) == []


def test_dictionary_entries_once_in_order() -> None:
    index = b"00-database-info\tA\tB\nbee\tF\tE\nant\tB\tE\nemmet\tB\tE\nbig\tBA\tB\n"
    text = b"?ant.bee\xff" + b" " * 55 + b"!"
    found = [(entry.name, entry.text, entry.replaced) for entry in formats.entries(index, text)]
    assert found == [("ant", "ant.", 0), ("bee", "bee\ufffd", 1), ("big", "!", 0)]


def r_vector(strings: list[tuple[int, bytes]]) -> bytes:
    content = b"X\n" + struct.pack(">iii", 3, 0, 0) + struct.pack(">i", 5) + b"UTF-8"
    content += struct.pack(">ii", 16, len(strings))
    for flags, string in strings:
        content += struct.pack(">ii", flags, len(string)) + string
    return struct.pack(">I", len(content)) + zlib.compress(content)


def test_r_strings_of_all_encodings() -> None:
    one = r_vector([(0x40009, b"plain"), (0x8009, "é".encode()), (0x4009, b"\xe9"), (0x40009, b"")])
    assert list(character_vectors(one + r_vector([(9, b"two")]))) == [["plain", "é", "é", ""], ["two"]]
    content = b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">ii", 13, 0)
    with pytest.raises(ValueError, match="not a character vector"):
        list(character_vectors(struct.pack(">I", len(content)) + zlib.compress(content)))


def test_manual_pages_without_comments_and_aliases(tmp_path: Path) -> None:
    page, alias = b'.\\" Copyright\n\'\\" t\n.TH x 1\ntext \\" kept', b".so man3/x.3\n"
    pages = {f"usr/share/man/man3/{n}.3.gz": gzip.compress(c) for n, c in (("x", page), ("y", alias))}
    package = write_debian_package(tmp_path / "p.deb", pages)
    assert [document.text for document in read_manuals([package])] == ['.TH x 1\ntext \\" kept']


def test_code_without_tests_and_empty_modules(tmp_path: Path) -> None:
    names = ("p/b.py", "p/a.py", "p/tests/test_a.py", "p/conf/locale/de/formats.py", "p/data.txt")
    files = {name: f"# {name}".encode() for name in names} | {"p/__init__.py": b"\n"}
    wheel = write_wheel(tmp_path / "p-1-py3-none-any.whl", files)
    assert [document.name for document in read_code([wheel])] == ["p/a.py", "p/b.py"]
