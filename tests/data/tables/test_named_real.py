"""The real tables: the published counts, and the same arrays from UCI's layout."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from dist_moe.data.fetch.archives import read_members
from dist_moe.data.tables import CensusIncomeConfig, MovieLensTableConfig
from dist_moe.data.tables.census_income import CENSUS, THEMIS
from tests.data.checks import PARTS, assert_same_arrays

pytestmark = pytest.mark.network

UCI_BYTES = (103_874_469, 51_918_813)
"""Sizes of UCI's own files, uncompressed."""

UCI_DISTINCT_VALUES = [
    9, 52, 47, 17, 3, 24, 15, 5, 10, 2, 3, 6, 8, 6, 6, 51, 38, 8, 10, 9, 10, 3, 4, 5, 43, 43, 43, 5, 3, 3, 3, 2,
]  # fmt: skip
"""How many the nominal attributes have by census-income.names, in order."""


def test_census_income_and_uci_s_layout(cache: Path, tmp_path: Path) -> None:
    table = CensusIncomeConfig(cache=cache).prepare(False)
    parts = [getattr(table, part) for part in PARTS]
    assert list(map(len, parts)) == [199_523, 49_881, 49_881]
    assert parts[0].target_NT.sum(axis=0, dtype=np.float64).tolist() == [12_382, 86_485]
    positives = sum(part.target_NT.sum(axis=0, dtype=np.float64) for part in parts[1:])
    assert positives.tolist() == [6_186, 43_143]
    rest_C = (np.asarray(parts[0].ids_NC) == 0).any(axis=0)  # "?", or a value that one row has
    distinct = [size - 1 + rest for size, rest in zip(table.columns.sizes, rest_C.tolist(), strict=True)]
    assert distinct == UCI_DISTINCT_VALUES
    assert len(table.columns.numeric) == 7
    files = read_members(cache / "downloads" / THEMIS.filename, CENSUS.remotes[0].members)
    assert tuple(len(file.content) for file in files) == UCI_BYTES
    (tmp_path / "census-income.data").write_bytes(files[0].content)
    (tmp_path / "census-income.test.gz").write_bytes(gzip.compress(files[1].content, 1))
    assert_same_arrays(table, CensusIncomeConfig(root=tmp_path, cache=tmp_path / "cache").prepare(False))


def test_movielens_with_its_features(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIST_MOE_DATA_ROOT", raising=False)
    table = MovieLensTableConfig(cache=cache).prepare(False)
    parts = [getattr(table, part) for part in PARTS]
    assert list(map(len, parts)) == [800_167, 100_021, 100_021]
    liked, stars = sum(part.target_NT.sum(axis=0, dtype=np.float64) for part in parts)
    assert liked == 348_971 + 226_310  # ratings of 4 and of 5 stars
    assert stars == 56_174 + 2 * 107_557 + 3 * 261_197 + 4 * 348_971 + 5 * 226_310
    sizes = dict(zip(table.columns.categorical, table.columns.sizes, strict=True))
    assert (sizes["user"], sizes["gender"], sizes["age"], sizes["occupation"]) == (6041, 3, 8, 22)
    assert table.columns.lists == (("genres", 19, 6),)
