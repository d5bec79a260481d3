"""The real corpora: counts, exact bytes, and that each domain is best told by its own words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_moe.data.text import Text, TextConfig, prepare_text
from dist_moe.data.text.brown import LETTERS, PACKAGE, read_genre

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def brown(cache: Path) -> Text:
    return prepare_text(TextConfig(name="brown", cache=cache, sequence_length=1), progress=False)


def test_brown_has_its_500_texts(brown: Text) -> None:
    documents = {name: sum(entry["documents"].values()) for name, entry in brown.manifest["domains"].items()}
    assert list(documents.values()) == [44, 27, 17, 17, 36, 48, 75, 30, 80, 29, 24, 6, 29, 29, 9]
    assert brown.vocab_size == 4096


def test_brown_comes_back_byte_by_byte(brown: Text, cache: Path) -> None:
    path = cache / "downloads" / PACKAGE.filename
    total = 0
    for index, (genre, letter) in enumerate(LETTERS.items()):
        originals = {document.text.strip() for document in read_genre(letter, [path])}
        found = set()
        for table in (brown.train, brown.val, brown.test):
            (mine,) = np.nonzero(table.domain_N == index)
            batch = table.batch(mine, mine)
            ids = batch.target_BS.flatten().tolist()
            total += int(batch.bytes_B.sum())
            found |= set(split_at(ids, brown))
        assert found == originals, genre
    assert total == sum(sum(entry["bytes"].values()) for entry in brown.manifest["domains"].values())
    assert total > 5_900_000


def split_at(ids: list[int], text: Text) -> list[str]:
    ends = [i for i, token in enumerate(ids) if token == text.end_of_text]
    return [text.tokenizer.decode(ids[b:e]) for b, e in zip([0, *(e + 1 for e in ends)], ends, strict=False)]


@pytest.mark.slow
def test_eight_domains_of_ten_megabytes(cache: Path) -> None:
    """Counts of what was read; words of a domain tell its held-out text from that of the others."""
    text = prepare_text(TextConfig(cache=cache), progress=False)
    entries = text.manifest["domains"].values()
    assert len(text.domains) == 8
    assert sum(sum(entry["bytes"].values()) for entry in entries) > 10_000_000
    assert all(1_900_000 < sum(entry["characters"].values()) <= 2_000_000 for entry in entries)
    count_DV = np.array([counts(text, text.train, domain) for domain in range(8)]) + 1.0
    log_DV = np.log(count_DV / count_DV.sum(axis=1, keepdims=True))
    for domain in range(8):
        assert int((log_DV @ counts(text, text.val, domain)).argmax()) == domain


def counts(text: Text, table: object, domain: int) -> np.ndarray:
    (mine,) = np.nonzero(table.domain_N == domain)  # type: ignore[attr-defined]
    tokens = table.batch(mine, mine).target_BS.flatten().numpy()  # type: ignore[attr-defined]
    return np.bincount(tokens, minlength=text.vocab_size)


@pytest.mark.slow
def test_clusters_find_the_eight_domains_again(cache: Path) -> None:
    """From the words of the sequences alone."""
    known = prepare_text(TextConfig(cache=cache), progress=False)
    found = prepare_text(TextConfig(cache=cache, clusters={"count": 8}), progress=False)
    for part, least in (("train", 0.92), ("test", 0.97)):
        pairs = np.zeros((8, 8), dtype=int)
        np.add.at(pairs, (getattr(known, part).domain_N, getattr(found, part).domain_N), 1)
        assert pairs.max(axis=0).sum() / pairs.sum() > least
