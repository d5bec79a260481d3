"""``dist-moe data fetch``: every data set that a configuration can name, and one line about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_moe.cli.data import DataSets
from dist_moe.cli.main import main
from dist_moe.data import DATA
from dist_moe.data.labelled_text.squad import DEV_FILE
from dist_moe.tasks import TASKS
from tests.data.graphs.tiny_graphs import tiny_graph, write_tiny_cora
from tests.data.labelled_text.tiny_texts import SAMPLES, write_messages
from tests.data.tables.tiny_named import write_tiny_census, write_tiny_kuairand, write_tiny_movielens_table
from tests.data.text.tiny_text import write_tiny_text
from tests.data.tiny_images import write_tiny_images
from tests.data.tiny_latest_small import write_tiny_latest_small
from tests.data.tiny_movielens import write_tiny_movielens
from tests.helpers.text_runs import write_encoder

Fetch = Callable[..., list[str]]


def write_big_cora(root: Path) -> Path:
    return write_tiny_cora(root, tiny_graph(nodes=1600, edges=3000))


@pytest.fixture
def fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fetch:
    """Fetch by name, from a root, with other options, into an empty cache; return the lines that are said."""
    monkeypatch.setenv("DIST_MOE_CACHE", str(tmp_path / "cache"))

    def fetch(name: str, root: Path, *options: object) -> list[str]:
        assert main(["data", "fetch", name, "--data-root", str(root), *map(str, options)]) == 0
        if name != "brown":
            assert list((tmp_path / "cache" / name).glob("*/manifest.json"))
        return capsys.readouterr().out.splitlines()

    return fetch


def test_all_data_sets_can_be_fetched() -> None:
    ours = [name for name, kind in TASKS.by_name.items() if kind.__module__.startswith("dist_moe.")]
    assert sorted(DataSets()) == sorted(ours) == DATA.names


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("movielens-1m", write_tiny_movielens, "60 users, 40 items, pairs to train on 1,"),
        ("movielens-latest-small", write_tiny_latest_small, "20 users, 15 items, pairs to train on 1"),
        (
            "movielens-1m-table",
            write_tiny_movielens_table,
            "7 categorical, 0 numeric and 1 list columns, mean of",
        ),
        (
            "census-income",
            write_tiny_census,
            "32 categorical, 7 numeric and 0 list columns, mean of",
        ),
        ("kuairand", write_tiny_kuairand, "36 categorical, 8 numeric and 1 list columns, mean of"),
        ("multi-fashion-mnist", write_tiny_images, "25 images to train on, pairs to train on 50, to validate 10, to"),
        ("cora", write_big_cora, "1,600 nodes, 6,000 edges, 8 features, 3 classes, 60 train nodes, 500 val nodes, "),
        ("multi-mnist", write_tiny_images, "25 images to train on, pairs to train on 50, to validate 10, to test 14"),
    ],
)
def test_one_line_says_what_there_is(
    fetch: Fetch, tmp_path: Path, name: str, write: Callable[[Path], Path], said: str
) -> None:
    (line,) = fetch(name, write(tmp_path / "root"))
    assert line.startswith(f"{name}: {said}")


def test_an_encoder_is_for_labelled_texts_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", "brown", "--encoder", str(tmp_path)]) == 2
    assert f"--encoder={tmp_path} is for texts that a BERT reads, and brown" in capsys.readouterr().err


def test_a_table_of_the_domains(fetch: Fetch, tmp_path: Path) -> None:
    title, *domains, last = fetch("brown", write_tiny_text(tmp_path / "root", count=60))
    assert title.split() == ["domain", "documents", "MB", "tokens:", "train", "val", "test"]
    assert [line.split()[:2] for line in domains] == [["letters", "60"], ["numbers", "60"], ["sea", "60"]]
    assert last.startswith("brown: 3 domains, ")


def test_a_table_of_discovered_domains(fetch: Fetch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_tiny_text(tmp_path / "root", count=60)
    *_, title, first, second = fetch("brown", root, "data.clusters.count=2", "data.sequence_length=64")
    assert title.split() == ["discovered", "sequences:", "train", "val", "test", "its", "words"]
    assert [line.split()[0] for line in (first, second)] == ["cluster-0", "cluster-1"]
    for override, said in (("seed=1", "only fields of the section data"), ("data.clusters.count=0", "count=0: input")):
        assert main(["data", "fetch", "brown", override]) == 2
        assert said in capsys.readouterr().err


def test_texts_are_cut_by_the_tokenizer_of_an_encoder(fetch: Fetch, tmp_path: Path) -> None:
    encoder, root = write_encoder(tmp_path / "encoder"), write_messages(tmp_path / "root")
    (line,) = fetch("sms-spam", root, "--encoder", encoder)
    assert line.startswith("sms-spam: 2 classes, ")
    assert line.endswith(" tokens, to train on 64, to validate 8, to test 8")


def test_questions_and_their_windows_are_counted(fetch: Fetch, tmp_path: Path) -> None:
    encoder, root = write_encoder(tmp_path / "encoder"), shutil.copytree(SAMPLES / "SQuAD", tmp_path / "root")
    content = json.loads((root / DEV_FILE).read_text())
    content["data"][0]["paragraphs"][0]["context"] += 150 * " and"  # in two windows of 384 tokens
    (root / DEV_FILE).write_text(json.dumps(content))
    (line,) = fetch("squad-v2", root, "--encoder", encoder)
    assert line.startswith("squad-v2: questions to train on 1")
    assert line.endswith(" windows, to validate 2 in 2 windows, to test 3 in 6 windows")


def test_a_root_is_asked_for_before_an_encoder_is_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("squad-v2", "rte"):
        assert main(["data", "fetch", name]) == 2
        assert "data.root is not given" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_name_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "fetch", "movielens-20m"])
    assert ended.value.code == 2
    assert "movielens-latest-small" in capsys.readouterr().err
