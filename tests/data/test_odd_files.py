"""Odd files in the place of data: refused with file, line, value and remedy, or read as they are meant."""

from __future__ import annotations

import gzip
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from dist_moe.config.files import read_bytes, read_json_object
from dist_moe.data.fetch import archives
from dist_moe.data.fetch.archives import File
from dist_moe.data.fetch.progress import Progress
from dist_moe.data.fetch.tables import comma_separated, separated
from dist_moe.data.labelled_text import LabelledTextConfig, prepare_labelled_text
from dist_moe.data.movielens import MovieLensConfig, prepare_movielens
from dist_moe.data.movielens.sources import EDITIONS
from dist_moe.data.prepared import NotUsable, load
from dist_moe.data.text import TextConfig, prepare_text
from dist_moe.data.tokenizer_files import read_tokenizer
from dist_moe.data.two_images import TwoImagesConfig, prepare_two_images
from dist_moe.errors import UserError

from .labelled_text.tiny_texts import tiny_tokenizer, write_messages, write_newsgroups, write_questions
from .text.test_own_tokenizer import byte_level
from .text.tiny_text import write_tiny_text
from .tiny_images import write_tiny_images
from .tiny_latest_small import write_tiny_latest_small
from .tiny_movielens import write_tiny_movielens


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


def movielens(root: Path) -> Callable[[], object]:
    name = "movielens-latest-small" if (root / "ratings.csv").exists() else "movielens-1m"
    return lambda: prepare_movielens(
        MovieLensConfig(name=name, root=root, cache=root.parent / "cache"),  # type: ignore[arg-type]
        progress=False,
    )


def add(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


@pytest.mark.parametrize("cell", ["9" * 30, str(2**63), "9" * 5000, "-1", "1.5", "\u0663", "1_0", "", "0x1", "nan"])
@pytest.mark.parametrize("place", [0, 1])
def test_ids_that_are_none(tiny: Path, cell: str, place: int) -> None:
    cells = ["1", "1"]
    cells[place] = cell
    add(tiny / "ratings.dat", f"{'::'.join(cells)}::5::0\n")
    message = refusal(movielens(tiny))
    assert f"ratings.dat, line {len((tiny / 'ratings.dat').read_text().splitlines())}: " in message
    assert f"expected a whole number from 0 to {2**63 - 1}" in message
    assert len(message) < 400


def test_large_ids_stay_apart(tmp_path: Path) -> None:
    """As fp64 they would be one user."""
    root = write_tiny_movielens(tmp_path / "raw")
    ids = [2**53, 2**53 + 1, 2**63 - 1]
    add(root / "ratings.dat", "".join(f"{user}::1::5::0\n" for user in ids))
    ratings = EDITIONS["movielens-1m"].locate(root).read(tmp_path, Progress(False))[0]
    assert ratings.user_ids[-3:].tolist() == ids


def test_a_long_cell_is_read_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    long = "x" * 200_000
    table = comma_separated(File(Path("f.csv"), f'text,label\n"{long}",1\n'.encode()))
    assert table.texts("text") == [long]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    root = write_tiny_latest_small(tmp_path / "raw")
    (root / "movies.csv").write_text((root / "movies.csv").read_text(encoding="utf-8"), encoding=encoding)
    message = refusal(movielens(root))
    assert "movies.csv" in message
    assert "UTF-16" in message
    assert "Remedy: save it" in message


def test_carriage_returns_alone() -> None:
    assert "carriage returns alone. Remedy" in refusal(lambda: separated(File(Path("f.tsv"), b"text\tlabel\ra\t1\r")))


def test_a_column_twice() -> None:
    table = separated(File(Path("f.tsv"), b"text\tlabel\ttext\na\t1\tb\n"))
    assert "has 2 columns 'text'" in refusal(lambda: table.texts("text"))


@pytest.mark.parametrize("cell", ["1_0", "\u0661", "0x1", "1,5", "1e999", "inf"])
def test_numbers_as_all_programs_write_them(cell: str) -> None:
    table = separated(File(Path("f.tsv"), f"text\tscore\na\t{cell}\n".encode()))
    assert "line 2: score=" in refusal(lambda: table.numbers("score", 0, 100))


def test_a_small_file_that_unpacks_to_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST_UNPACKED", 1000)
    assert File(Path("f.gz"), gzip.compress(b"a" * 1000)).text() == "a" * 1000
    message = refusal(lambda: File(Path("f.gz"), gzip.compress(b"a" * 1001)).text())
    assert "f.gz holds more than 1,000 bytes when it is unpacked. Remedy" in message


@pytest.mark.parametrize("shape", [(2**31, 2**31, 4), (2**32 - 1, 28, 28), (2**32 - 1, 2**32 - 1, 2**32 - 1)])
def test_images_whose_header_promises_too_much(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """The product of the first wraps to 0 in 64 bits."""
    root = write_tiny_images(tmp_path / "raw", gz=False)
    (root / "train-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", *shape))
    config = TwoImagesConfig(name="multi-mnist", root=root, cache=tmp_path / "cache")
    assert "train-images-idx3-ubyte holds 0 values" in refusal(lambda: prepare_two_images(config, progress=False))


KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": lambda path: path.mkdir(),
    "dangling": lambda path: path.symlink_to("nothing"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_in_the_place_of_one_is_named_at_once(tmp_path: Path, kind: str) -> None:
    """A pipe is never waited for, an endless device never read."""
    ratings = write_tiny_movielens(tmp_path / "ratings") / "ratings.dat"
    document = write_tiny_text(tmp_path / "text") / "sea" / "000.txt"
    tokenizer = tmp_path / "tokenizer.json"
    manifest = tmp_path / "prepared" / "manifest.json"
    manifest.parent.mkdir()
    for path in (ratings, document, tokenizer, manifest):
        path.unlink(missing_ok=True)
        KINDS[kind](path)
    text = TextConfig(root=tmp_path / "text", cache=tmp_path / "cache")
    begin = time.monotonic()
    assert "ratings.dat, which is no file" in refusal(movielens(ratings.parent))
    assert "sea/000.txt, which is no file" in refusal(lambda: prepare_text(text, progress=False))
    assert "cannot be read" in refusal(lambda: read_tokenizer(tokenizer))
    with pytest.raises(NotUsable):
        load(manifest.parent)
    with pytest.raises(OSError):  # noqa: PT011 - its kind says why
        read_bytes(tokenizer)
    assert time.monotonic() - begin < 5


def test_json_that_is_deep_or_no_object(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in ("[" * 100_000, "1", "[]", "9" * 5000, "{", ""):
        path.write_text(content)
        with pytest.raises(ValueError):  # noqa: PT011 - of many kinds
            read_json_object(path)
    path.write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json_object(path) == {"a": 1}


def text_of(root: Path, **fields: object) -> TextConfig:
    given = {"root": root, "cache": root.parent / "cache", "vocab_size": 300, "sequence_length": 8}
    return TextConfig.model_validate(given | fields)


def test_a_domain_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    root = write_tiny_text(tmp_path / "text", count=4)
    os.rename(os.fsencode(root / "sea"), os.fsencode(root / "sea") + b"\xff")
    message = refusal(lambda: prepare_text(text_of(root), progress=False))
    assert r"a directory b'sea\xff'" in message
    assert "Remedy: rename it" in message


def test_text_that_would_train_as_nuls(tmp_path: Path) -> None:
    root = write_tiny_text(tmp_path / "text", count=4)
    for encoding in ("utf-16", "utf-16-le", "utf-32-be"):
        (root / "sea" / "000.txt").write_text("a\nb", encoding=encoding)
        message = refusal(lambda: prepare_text(text_of(root), progress=False))
        assert str(root / "sea" / "000.txt") in message
        assert "Remedy: save it" in message


def test_suffixes_in_capitals_are_read_and_others_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tiny_text(tmp_path / "text", count=4)
    plain = prepare_text(text_of(root), progress=False)
    (root / "sea" / "000.txt").rename(root / "sea" / "000.TXT")
    for name in ("notes.md", "._001.txt", "readme"):
        (root / "sea" / name).write_bytes(b"\0\1")
    (root / "LICENSE").write_text("x")
    capsys.readouterr()
    same = prepare_text(text_of(root), progress=True)
    said = capsys.readouterr().err
    assert "passed over, not being DOMAIN/NAME.txt: 4 entries of data.root" in said
    assert all(name in said for name in ("sea/notes.md", "sea/._001.txt", "sea/readme", "LICENSE"))
    documents = [text.manifest["domains"]["sea"]["documents"] for text in (plain, same)]
    assert documents[0] == documents[1]
    (root / "sea" / "below").mkdir()
    (root / "sea" / "below" / "x.Txt").write_text("deep")
    assert "deeper than in a domain: sea/below/x.Txt" in refusal(lambda: prepare_text(text_of(root), progress=False))
    (root / "loose.TXT").write_text("loose")
    assert "text that is in no domain: loose.TXT" in refusal(lambda: prepare_text(text_of(root), progress=False))


def test_documents_beyond_the_limit_are_counted_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tiny_text(tmp_path / "text", count=8)
    prepare_text(text_of(root, characters_per_domain=3000, sequence_length=4, held_out=0.3), progress=True)
    assert "beyond data.characters_per_domain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"vocab_size": "400"}', "vocab_size='400'; expected a whole number"),
        ('{"vocab_size": 400.0}', "vocab_size=400.0; expected"),
        ('{"vocab_size": -1}', "vocab_size=-1; expected"),
        (f'{{"vocab_size": {10**12}}}', "vocab_size=1000000000000; expected"),
        (f'{{"eos_token_id": {10**30}}}', "which is no token's id"),
        ("[]", "it is no JSON object"),
        ("[" * 100_000, "too deep"),
    ],
)
def test_what_stands_beside_a_tokenizer(tmp_path: Path, content: str, message: str) -> None:
    root = write_tiny_text(tmp_path / "text", count=4)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(content)
    config = text_of(root, tokenizer=tmp_path)
    assert message in refusal(lambda: prepare_text(config, progress=False))


def with_gap(tokenizer: Tokenizer, number: int) -> Tokenizer:
    text = tokenizer.to_str()
    return Tokenizer.from_str(text.replace('"##z":', f'"##gap":{number},"##z":', 1))


def test_ids_with_gaps(tmp_path: Path) -> None:
    """A model needs a row for the largest id, however few tokens there are; absurd ones are refused."""
    config = LabelledTextConfig(name="sms-spam", root=write_messages(tmp_path / "raw"), cache=tmp_path / "cache")
    found = prepare_labelled_text(config, with_gap(tiny_tokenizer(), 5000), progress=False)
    assert found.vocabulary == 5001
    message = refusal(lambda: prepare_labelled_text(config, with_gap(tiny_tokenizer(), 2**24), progress=False))
    assert "one of id 16,777,216; allowed: ids below 16,777,216" in message


def test_what_the_library_quotes_is_cut(tmp_path: Path) -> None:
    text = byte_level().to_str().replace('"<pad>":0', f'"<pad>":"{"x" * 100_000}"', 1)
    (tmp_path / "tokenizer.json").write_text(text)
    message = refusal(lambda: read_tokenizer(tmp_path))
    assert "cannot be read: " in message
    assert len(message) < 1000


def test_a_tokenizer_without_a_token_for_the_unknown(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer().to_str().replace('"unk_token":"[UNK]"', '"unk_token":"[NONE]"'))
    root = write_messages(tmp_path / "raw")
    add(root / "sms-spam.csv", "x,1,\u6771\u4eac\r\n")
    config = LabelledTextConfig(name="sms-spam", root=root, cache=tmp_path / "cache")
    message = refusal(lambda: prepare_labelled_text(config, tokenizer, progress=False))
    assert "data.tokenizer fails on the text" in message


def test_examples_are_not_taken_for_the_lines_of_a_header(tmp_path: Path) -> None:
    root = write_newsgroups(tmp_path / "raw")
    path = root / "20newsgroups-train.tab"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], *lines[4:]]))
    config = LabelledTextConfig(name="20-newsgroups", root=root, cache=tmp_path / "cache")
    message = refusal(lambda: prepare_labelled_text(config, tiny_tokenizer(), progress=False))
    assert "20newsgroups-train.tab, line 2: an example, where types and roles" in message


def test_examples_left_out_are_counted_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LabelledTextConfig(name="trec", root=write_questions(tmp_path / "raw"), cache=tmp_path / "cache")
    prepare_labelled_text(config, tiny_tokenizer(), progress=True)
    assert "examples left out: 90 repeated" in capsys.readouterr().err


def test_paths_that_stand_for_nobody(tmp_path: Path) -> None:
    config = MovieLensConfig(root=Path("~nobody-of-this-name/data"), cache=tmp_path)
    assert "no such home directory" in refusal(lambda: prepare_movielens(config, progress=False))


def test_pixels_and_labels_survive_all_this(tmp_path: Path) -> None:
    root = write_tiny_images(tmp_path / "raw", gz=False)
    config = TwoImagesConfig(name="multi-mnist", root=root, cache=tmp_path / "cache")
    found = prepare_two_images(config, progress=False)
    content = (root / "t10k-labels-idx1-ubyte").read_bytes()[8:]
    assert np.array_equal(found.test.labels, np.frombuffer(content, np.uint8))
