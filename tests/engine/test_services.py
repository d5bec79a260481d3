"""Weights & Biases, trackio and MLflow: what they were given is what metrics.jsonl has, also after a resume."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_moe.config.files import parse_json, read_json
from dist_moe.engine.monitor.board_tags import tag_of
from dist_moe.engine.monitor.monitor import Monitor
from dist_moe.engine.monitor.pictures import NamedBars
from dist_moe.engine.monitor.run_directory import RunDirectory
from dist_moe.engine.monitor.services import MLflowSettings, Row, Service, ServiceTracker, WandbSettings
from dist_moe.engine.monitor.tensorboard import TensorBoardSettings
from dist_moe.engine.monitor.trackers import MetricsFileSettings, TrackerSettings
from dist_moe.errors import UserError
from dist_moe.recipes.recipe import plan_run_of, validate_config
from tests.helpers.runs import records_of, validations_of

PANELS = (NamedBars({"one": 1.0, "two": 2.0}, "bars"),)
Points = dict[tuple[str, int], float]


def attempt(root: Path, trackers: Sequence[TrackerSettings], first: int, last: int) -> dict[str, int]:
    """Steps after ``first`` up to ``last``, collected by three, each fourth validated; returns what was lost."""
    run = RunDirectory(root)
    run.create()
    common = {"is_rank_zero": True, "total_steps": 12, "steps_per_epoch": 12}
    monitor = Monitor(run, (MetricsFileSettings(), TensorBoardSettings(), *trackers), first_step=first, **common)  # type: ignore[arg-type]
    monitor.picture("placement/rank_of_expert", PANELS, first)
    window: list[dict[str, Any]] = []
    for step in range(first + 1, last + 1):
        window.append({"step": step, "loss": 1 / step, "lr": 0.1 * step, "load": [[step, 1, 0]]} | speed())
        if step % 4 == 0:
            loss = math.nan if step == 8 else 2.0 / step
            monitor.evaluation("validation", {"loss": loss, "auc": 0.5, "by_layer": {"a": 1.0, "b": 2.0}}, step)
        if step % 3 == 0 or step == last:
            monitor.steps(window)
            window = []
            monitor.text("configuration", "| a | b |", step)
            monitor.hyperparameters({"model.gate.name": "comet", "seed": first, "x": True})
    if first < last:
        monitor.text("alarm", "collapse: <layer> 0", last - 2)
    if last == 10:
        monitor.metrics("test", {"loss": 0.25}, last)
    monitor.close()
    return monitor.lost_records


def speed() -> dict[str, float]:
    return {"wire_bytes": 1024.0, "examples_per_second": 1.0}


def expected(root: Path) -> Points:
    """The numbers of metrics.jsonl by tag and step, and that of the test."""
    points = {
        (tag_of(name), record["step"]): value
        for record in records_of(root)
        for name, value in record.items()
        if isinstance(value, float) and name != "epoch"
    }
    for step, metrics in validations_of(root).items():
        points |= {(f"validation/{name}", step): value for name, value in metrics.items() if name != "by_layer"}
    return points | {("test/loss", 10): 0.25}


def assert_equal(shown: Points, root: Path) -> None:
    wanted = expected(root)
    assert len(wanted) > 40
    assert shown.keys() == wanted.keys()
    for key, value in wanted.items():
        assert shown[key] == pytest.approx(value, rel=1e-12, nan_ok=True), key


def in_three_attempts(root: Path, settings: TrackerSettings) -> None:
    """Steps 1 to 6, again from 4 to 10, and the end of it once more: each step stands in metrics.jsonl once."""
    for first, last in ((0, 6), (4, 10), (10, 10)):
        lost = attempt(root, [settings], first, last)
        assert lost == {"jsonl": 0, "tensorboard": 0, settings.name: 0}
    assert [record["step"] for record in records_of(root)] == list(range(1, 11))


def wandb_records(root: Path) -> Iterator[tuple[int, Any]]:
    """The attempt and the records of its transaction log: LevelDB's format of logs, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    for number, path in enumerate(sorted(root.glob("wandb/offline-run-*/run-*.wandb"))):
        content, at, message = path.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if 2**15 - at % 2**15 < 7:
                at += 2**15 - at % 2**15
                continue
            size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
            message += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in {1, 4}:  # whole, or the last part
                yield number, Record.FromString(message)
                message = b""


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("wandb")
    root = tmp_path_factory.mktemp("wandb") / "run"
    in_three_attempts(root, WandbSettings(project="p"))
    return root


def test_wandb_has_the_numbers_of_metrics_jsonl(wandb_run: Path) -> None:
    shown: Points = {}
    media: dict[str, list[Any]] = {}
    attempts: dict[int, list[int]] = {}
    for number, record in wandb_records(wandb_run):
        if record.WhichOneof("record_type") == "history":
            values = {
                "/".join([item.key, *item.nested_key]).strip("/"): item.value_json for item in record.history.item
            }
            step = int(values.pop("_step"))
            attempts.setdefault(number, []).append(step)
            kinds = {name.removesuffix("/_type"): x for name, x in values.items() if name.endswith("/_type")}
            for name, kind in kinds.items():
                media.setdefault(name, []).append((step, parse_json(kind)))
            for name, text in values.items():
                if name[0] != "_" and name.rpartition("/")[0] not in kinds:
                    assert (name, step) not in shown
                    shown[name, step] = math.nan if text == '"NaN"' else float(text)
    assert_equal(shown, wandb_run)
    assert attempts == {0: [*range(7)], 1: [*range(7, 11)], 2: [11]}, "each in one attempt, and in order"
    assert media["placement/rank_of_expert"] == [(step, "image-file") for step in (0, 7, 11)], "of steps 0, 4 and 10"
    assert media["experts/load"] == [(6, "image-file"), (10, "image-file")]
    assert media["alarm"] == [(6, "html-file"), (10, "html-file")], "nothing is taken for a step that is over"
    assert len(list(wandb_run.glob("wandb/offline-run-*/files/media/images/validation/by_layer_*.png"))) == 2


def test_wandb_goes_on_with_one_run(wandb_run: Path) -> None:
    (run_id,) = {record.run.run_id for _, record in wandb_records(wandb_run) if record.run.run_id}
    assert read_json(wandb_run / "wandb.json")["id"] == run_id
    chosen: dict[str, str] = {}
    for _, record in wandb_records(wandb_run):
        chosen |= {item.key or item.nested_key[0]: item.value_json for item in record.config.update}
    assert chosen["model.gate.name"] == '"comet"'
    assert chosen["seed"] == "4", "the last attempt that had a step"


@pytest.fixture(scope="module")
def mlflow_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    directory = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{directory}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    number = client.create_experiment("e", artifact_location=f"file://{directory}/artifacts")
    in_three_attempts(directory / "run", MLflowSettings(uri=uri, experiment="e"))
    (run,) = client.search_runs([number])
    return directory / "run", client, run


def test_mlflow_has_the_numbers_of_metrics_jsonl(mlflow_run: tuple[Path, Any, Any]) -> None:
    root, client, run = mlflow_run
    points = [
        (m.key, m.step, m.value) for key in run.data.metrics for m in client.get_metric_history(run.info.run_id, key)
    ]
    assert_equal({(tag, step): value for tag, step, value in points}, root)
    assert len(points) == len(expected(root)), "no point twice"


def test_mlflow_has_pictures_texts_and_fields(mlflow_run: tuple[Path, Any, Any]) -> None:
    root, client, run = mlflow_run
    assert read_json(root / "mlflow.json")["id"] == run.info.run_id
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"model.gate.name": "comet", "seed": "0", "x": "True"}
    names = [Path(one.path).name for one in client.list_artifacts(run.info.run_id, "images")]
    assert {(name.split("+")[0], name.split("+")[2]) for name in names} >= {
        ("experts~load", "6"),
        ("experts~load", "10"),
        ("placement~rank_of_expert", "0"),
        ("validation~by_layer", "4"),
    }
    texts = [one.path for one in client.list_artifacts(run.info.run_id, "alarm")]
    assert texts == ["alarm/step-00000004.md", "alarm/step-00000008.md"]


class FakeTrackio(ModuleType):
    """What trackio 0.43 has of what is used here, with its signatures; it keeps the points of each run by its name."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.Image, self.Markdown = Image.Image.copy, str

    def init(
        self,
        project: str,
        name: str | None = None,
        group: str | None = None,
        space_id: str | None = None,
        server_url: str | None = None,
        config: Mapping[str, Any] | None = None,
        resume: str = "never",
        embed: bool = True,
    ) -> Any:
        assert (project, resume, space_id, embed) == ("dist_moe", "allow", None, False)
        assert name is not None
        print("* Trackio project initialized")
        points = self.runs.setdefault(name, [])

        class Run:
            def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
                assert step is not None
                points.append((step, metrics))

            def finish(self) -> None:
                print("* Run finished")

        return Run()


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> FakeTrackio:
    fake = FakeTrackio()
    fake.__spec__ = find_spec("json")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return fake


def test_trackio_has_the_numbers_of_metrics_jsonl(
    trackio: FakeTrackio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = WandbSettings(library="trackio")
    settings.check()
    in_three_attempts(tmp_path / "run", settings)
    ((name, points),) = trackio.runs.items()
    assert name == f"run {read_json(tmp_path / 'run' / 'trackio.json')['id']}"
    numbers = [(tag, step, x) for step, values in points for tag, x in values.items() if isinstance(x, float)]
    assert_equal({(tag, step): x for tag, step, x in numbers}, tmp_path / "run")
    assert len(numbers) == len(expected(tmp_path / "run")), "no point twice"
    tables = [values["hyperparameters"] for step, values in points if step == 9 and "hyperparameters" in values]
    assert "| seed | 4 |" in tables[0]
    assert capsys.readouterr().out == "", "standard output is for results"


class Broken(Service):
    """Fails in one of its calls; ``gate``: what a call waits for."""

    title = "the board"

    def __init__(self, fails: str, gate: threading.Event | None = None) -> None:
        self.fails, self.gate, self.rows = fails, gate, list[Row]()

    def _call(self, name: str) -> None:
        if self.gate is not None:
            self.gate.wait()
        if name == self.fails:
            raise ConnectionError("no\nroute to host")

    def open(self, run_id: str | None, name: str, last_step: int) -> tuple[str, str | None]:
        self._call("open")
        return run_id or "new", "https://somewhere"

    def send(self, rows: Sequence[Row]) -> None:
        self._call("send")
        self.rows += rows

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize(("fails", "lost"), [("open", 10), ("send", 10), ("close", 0), ("", 0)])
def test_a_board_that_fails_costs_its_records_alone(fails: str, lost: int, tmp_path: Path) -> None:
    told: list[str] = []
    tracker = ServiceTracker(service := Broken(fails), tmp_path / "note.json", 0, told.append)
    for step in range(1, 11):
        tracker.step({"step": step, "loss": 1.0})
        tracker.flush()
    tracker.close()
    assert (tracker.lost, len(service.rows)) == (lost, 10 - lost)
    failure = "warning: the board fails: ConnectionError: no route to host; the training goes on without"
    assert told.count(failure) == bool(fails), "once"
    assert ("warning: 10 record(s) for the board are lost" in told) == (lost > 0)
    assert ("the board: https://somewhere" in told) == (fails != "open")


def test_a_board_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_moe.engine.monitor.services.PATIENCE_S", 0.2)
    monkeypatch.setattr("dist_moe.engine.monitor.services.MOST_WAITING", 4)
    told: list[str] = []
    tracker = ServiceTracker(Broken("", gate := threading.Event()), tmp_path / "note.json", 0, told.append)
    for step in range(1, 11):
        tracker.step({"step": step, "loss": 1.0})
        tracker.flush()
    tracker.close()
    gate.set()
    assert tracker.lost == 10
    assert "warning: the board has not taken everything in within 0.2 s" in told


def test_a_validation_waits_for_the_steps_before_it(tmp_path: Path) -> None:
    tracker = ServiceTracker(service := Broken(""), tmp_path / "note.json", 0, print)
    tracker.metrics("validation", {"loss": 1.0}, 3)
    tracker.flush()
    for step in range(1, 5):
        tracker.step({"step": step, "loss": 1.0})
    tracker.close()
    assert [(row.step, sorted(row.numbers)) for row in service.rows] == [
        (step, ["loss/task"] + ["validation/loss"] * (step == 3)) for step in range(1, 5)
    ]


def test_a_note_that_cannot_be_read_begins_another_run(tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text("{torn")
    told: list[str] = []
    tracker = ServiceTracker(Broken(""), tmp_path / "note.json", 5, told.append)
    tracker.close()
    assert any("note.json" in one and one.endswith("a new run begins there") for one in told)
    assert read_json(tmp_path / "note.json") == {"id": "new", "sent": {}}


def test_the_load_of_steps_that_no_file_has_is_white(tmp_path: Path) -> None:
    """Without TensorBoard's files a resumed run knows nothing of the load of earlier steps, and shows none."""
    tracker = ServiceTracker(Broken(""), tmp_path / "note.json", 6, print)
    tracker.step({"step": 7, "load": [[3, 1]]})
    tracker.close()
    steps, share_CLE = tracker._history.shares()
    assert steps.tolist() == [6, 7]
    np.testing.assert_allclose(share_CLE[:, 0], [[0, 0], [0.75, 0.25]])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (WandbSettings(), ["package wandb", "comet-dist-moe[wandb]"]),
        (WandbSettings(library="trackio"), ["package trackio", "comet-dist-moe[trackio]"]),
        (MLflowSettings(), ["package mlflow", "comet-dist-moe[mlflow]"]),
    ],
)
def test_a_package_that_is_missing_is_named(
    settings: TrackerSettings, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_moe.engine.monitor.services.find_spec", lambda module: None)
    with pytest.raises(UserError) as caught:
        settings.check()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "variable", "word"),
    [
        ({"mode": "online"}, None, "space=None"),
        ({"space": "a/b"}, None, "space=a/b"),
        ({"entity": "a"}, None, "entity=a"),
        ({}, "TRACKIO_SPACE_ID", "TRACKIO_SPACE_ID tells"),
    ],
)
def test_what_trackio_cannot_do_is_refused(
    fields: dict[str, Any], variable: str | None, word: str, trackio: FakeTrackio, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is not None:
        monkeypatch.setenv(variable, "a/b")
    with pytest.raises(UserError, match=word):
        WandbSettings(library="trackio", **fields).check()


def test_a_tracker_stands_there_once(tmp_path: Path) -> None:
    """All that a user sees: before any process group exists, whatever recipe."""
    config = validate_config({"trackers": ["jsonl", "tensorboard", "jsonl"]})
    with pytest.raises(UserError, match="each can be there once"):
        plan_run_of(config, tmp_path / "run")
