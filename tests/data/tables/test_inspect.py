"""``dist-moe data inspect``: a guess at a table's schema, which is a valid section ``data``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_moe.cli.main import main
from dist_moe.config.plain_yaml import parse_yaml
from dist_moe.data.tables import TableConfig, prepare_own_table

from .naive import write_csv, write_parquet

ROWS = [
    {
        "user_id": i % 30,
        "price": i * 1.5,
        "views": i * 7 % 1000,
        "#odd: {name},'": "x" if i % 3 else "two\nlines",
        "tags": ["a", "b"][: i % 3] or None,
        "seen": f"2024-01-{i % 28 + 1:02d}",
        "bought": i % 2,
        "liked": "no" if i % 5 else "yes",
        "always": "k",
        "never": None,
        "x" * 200: 1,
    }
    for i in range(150)
]
FEATURES = {
    "user_id": {"type": "categorical"},
    "price": {"type": "numeric"},
    "views": {"type": "numeric"},
    "#odd: {name},'": {"type": "categorical"},
    "tags": {"type": "list"},
}


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], str]:
    assert main(["data", "inspect", *map(str, arguments)]) == 0
    text = capsys.readouterr().out
    return parse_yaml(text, "what was printed")["data"], text


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_a_guess_can_be_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Any) -> None:
    path = write(tmp_path / "t", ROWS)
    found, text = inspected(capsys, path, "--target", "liked", "--target", "bought")
    assert found.pop("columns") == FEATURES | {
        "tags": {"type": "list"} | ({"separator": "|"} if write is write_csv else {})
    }
    targets = {"liked": {"type": "binary", "positive": ["yes"]}, "bought": {"type": "binary"}}
    assert found == {"name": "table", "files": str(path), "targets": targets}
    assert "bought: {type: binary}  # 2 values: '0', '1'\n" in text
    assert "# left out: 'seen', times; data.split.latest_by may name it\n" in text
    assert "# left out: 'always', always 'k'\n" in text
    assert "# left out: 'never', always missing\n" in text
    config = TableConfig(**found, columns=FEATURES, cache=tmp_path / "cache")
    assert len(prepare_own_table(config, progress=False).test) == 15


def test_the_last_labels_are_proposed_as_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "t", [{"a": "x" * (i % 2), "y": i % 2, "z": i % 3 % 2, "b": i % 5} for i in range(9)])
    path.write_text(path.read_text(encoding="utf-8").replace(",", ";"), encoding="utf-8")
    found, text = inspected(capsys, path, "--separator", ";")
    assert (found["targets"], found["separator"]) == ({"z": {"type": "binary"}}, ";")
    assert "y: {type: categorical}  # 2 values: '0', '1'; may be a target\n" in text


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "t", ROWS)
    odd = write_csv(tmp_path / "odd", [{"y": "a", "x": 1}] * 2 + [{"y": "b\nc", "x": 2}])
    for arguments, said in (
        ([tmp_path / "none"], "none: there is no such file; give a CSV or Parquet file"),
        ([path, "--target", "nobody"], "has no column 'nobody'; its columns: ['user_id', "),
        ([path, "--target", "always"], "--target=always cannot be predicted, being always 'k'; see"),
        ([path, "--target", "x" * 200], "cannot be predicted, being without a short name of its own"),
        ([odd, "--target", "y"], "'y': {'type': 'binary', 'positive': ['b\\nc']} does not go on one line of YAML"),
        ([write_csv(tmp_path / "v", [{"y\nz": 1}])], "v has no column whose name is usable: ['y\\nz']"),
        ([path, "--separator", ";"], "does another character part its cells? (data.separator, --separator of"),
        ([path, "--separator", "::"], "--separator='::' is not one character"),
    ):
        assert main(["data", "inspect", *map(str, arguments)]) == 2
        assert said in capsys.readouterr().err
    assert main(["data", "fetch", "table"]) == 2
    assert "'dist-moe data inspect FILE' describes it" in capsys.readouterr().err
