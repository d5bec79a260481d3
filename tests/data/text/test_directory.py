"""A user's own text: what is read, what is noted, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_moe.data.text import Text, TextConfig, prepare_text
from dist_moe.errors import UserError

from .conftest import SMALL
from .tiny_text import tiny_documents, write_text


def prepare(root: Path, tmp_path: Path, **more: object) -> Text:
    return prepare_text(TextConfig(root=root, cache=tmp_path / "cache", **SMALL | more))


def test_empty_documents_doubles_and_bad_bytes_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = tiny_documents()
    documents["sea"] += ["", " \r\n\t", documents["sea"][0] + "\n", documents["letters"][0]]
    root = write_text(tmp_path / "root", documents)
    (root / "numbers" / "bad.txt").write_bytes(b"\xef\xbb\xbf" + b"caf\xe9 \xff and \xef\xbf\xbd kept\r\n" * 3)
    text = prepare(root, tmp_path)
    entries = text.manifest["domains"]
    assert entries["sea"]["dropped"] == {"empty": 2, "duplicate": 2, "beyond_limit": 0}
    assert sum(entries["sea"]["documents"].values()) == len(tiny_documents()["sea"])
    assert entries["numbers"]["replaced_characters"] == 6
    said = capsys.readouterr().err
    assert "note: sea: documents left out: 2 empty, 2 duplicate" in said
    assert "note: numbers: 6 places are no UTF-8 and became U+FFFD" in said


def test_a_file_that_changes_domain_or_content_is_another_corpus(tmp_path: Path) -> None:
    root = write_text(tmp_path / "root", tiny_documents())
    before = prepare(root, tmp_path).manifest["domains"]
    (root / "letters" / "019.txt").rename(root / "numbers" / "000a.txt")
    after = prepare(root, tmp_path).manifest["domains"]
    assert [sum(after[name]["documents"].values()) for name in before] == [19, 21, 20]
    (root / "sea" / "000.txt").write_text("other words")
    assert prepare(root, tmp_path).manifest["domains"]["sea"]["bytes"] != before["sea"]["bytes"]


def test_domains_and_limits(tmp_path: Path) -> None:
    root = write_text(tmp_path / "root", tiny_documents())
    chosen = prepare(root, tmp_path, domains=("sea", "letters"), characters_per_domain=4000)
    assert chosen.domains == ("letters", "sea")
    for entry in chosen.manifest["domains"].values():
        assert 3000 < sum(entry["characters"].values()) <= 4000
        assert sum(entry["documents"].values()) + entry["dropped"]["beyond_limit"] == 20
    alone = prepare(root, tmp_path, domains=("sea",), characters_per_domain=4000)
    assert alone.manifest["domains"]["sea"]["characters"] == chosen.manifest["domains"]["sea"]["characters"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"domains": ("land",)}, r"data\.domains: there is no domain land; there are letters, numbers, sea"),
        ({"characters_per_domain": 300}, r"the domain letters has \d documents .* within data\.characters_per_domain"),
    ],
)
def test_fields_that_do_not_fit_the_text(tmp_path: Path, more: dict[str, object], message: str) -> None:
    root = write_text(tmp_path / "root", tiny_documents())
    with pytest.raises(UserError, match=message):
        prepare(root, tmp_path, **more)


def test_wrong_layouts_are_named(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with pytest.raises(UserError, match=f"{root} is not a directory. Remedy"):
        prepare(root, tmp_path)
    root.mkdir()
    with pytest.raises(UserError, match=f"{root} has no directories. Remedy"):
        prepare(root, tmp_path)
    write_text(root, tiny_documents())
    (root / "loose.txt").write_text("loose")
    with pytest.raises(UserError, match=r"text that is in no domain: loose\.txt\. Remedy"):
        prepare(root, tmp_path)
    (root / "loose.txt").unlink()
    (root / "sea" / "below").mkdir()
    (root / "sea" / "below" / "a.txt").write_text("deep")
    with pytest.raises(UserError, match=r"deeper than in a domain: sea/below/a\.txt\. Remedy"):
        prepare(root, tmp_path)
    (root / "void").mkdir()
    (root / "sea" / "below" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"no \.txt file in its directory void\. Remedy"):
        prepare(root, tmp_path)
