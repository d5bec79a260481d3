"""TensorBoard's events read back: what the numbers mean, the data behind the pictures, and how many keys there are."""

from __future__ import annotations

import io
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_ndarray

from dist_moe.engine.monitor.board_tags import LAYOUT, TAGS
from dist_moe.engine.monitor.event_records import crc32c, framed
from dist_moe.engine.monitor.load import HISTOGRAM, describe_load, effective_experts
from dist_moe.engine.monitor.load_history import MAX_COLUMNS, LoadHistory, over_time, step_names
from dist_moe.engine.monitor.pictures import Bars, HeatMap, NamedBars, Panel, draw, fitted, layout, short_names
from dist_moe.engine.monitor.speed import describe_speed, peak_flops_of
from dist_moe.engine.monitor.tables import RouterPictures
from dist_moe.engine.monitor.tensorboard import LOAD_SHARE, TensorBoardTracker
from dist_moe.search import PermutationSearch
from tests.helpers.board import read_board, served, steps_of


def record_of(step: int, load: list[list[int]], histogram: list[int] | None = None) -> dict[str, Any]:
    """A record with all numbers that a run can have, from zeros but for the load."""
    record: dict[str, Any] = dict.fromkeys(TAGS, 0.0) | {"step": step, "load": load}
    return record | ({} if histogram is None else {HISTOGRAM: histogram})


def test_numbers_of_the_load_by_hand() -> None:
    """Two layers of four and of three experts, by loops."""
    layers = [[6, 2, 0, 0], [5, 5, 5]]
    record = record_of(1, [layers[0], [*layers[1], 0]], [1, 5, 2, 2])
    describe_load([record], [4, 3])
    effective, deviations, dead = [], [], 0
    for load_E in layers:
        share_E = [rows / sum(load_E) for rows in load_E]
        effective.append(math.exp(-sum(s * math.log(s) for s in share_E if s)))
        mean = sum(load_E) / len(load_E)
        deviations.append(math.sqrt(sum((rows - mean) ** 2 for rows in load_E) / len(load_E)) / mean)
        dead += load_E.count(0)
    assert record["effective_experts"] == pytest.approx(sum(effective) / 2)
    assert record["effective_experts_least"] == pytest.approx(min(effective))
    assert (record["dead_experts"], record["load_max_over_mean"]) == (dead, 6 / 2)
    assert record["load_cv"] == pytest.approx(max(deviations))
    assert record["load"] == layers, "cut to the experts that there are"
    assert [record[f"active_experts_{which}"] for which in ("p10", "p50", "p90", "max")] == [0, 1, 3, 3]
    assert HISTOGRAM not in record
    assert effective_experts([[0, 0], [7, 7]]).tolist() == [0, pytest.approx(2)]


def test_speeds_by_hand() -> None:
    """Two examples of five tokens in half a second, at ten FLOPs per token and expert, on devices that do 1,000 a s."""
    records = [{"step_seconds": 0.5, "tokens": 10.0, "active_experts": 3.0}, {"step_seconds": 0.5}]
    model = SimpleNamespace(training_flops_per_token=lambda length, experts: 10 * experts + length)
    describe_speed(records, model, 2, 1000.0)  # type: ignore[arg-type]
    assert (records[0]["examples_per_second"], records[0]["tokens_per_second"]) == (4, 20)
    assert records[0]["mfu"] == pytest.approx((10 * 3 + 5) * 20 / 1000)
    assert records[1] == {"step_seconds": 0.5, "examples_per_second": 4}
    assert peak_flops_of(torch.device("cpu"), torch.nn.Linear(1, 1), 2) is None


def test_records_are_framed_as_tensorboard_frames_them() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    for size in (0, 1, 63, 64, 65, 1700):
        content, file = os.urandom(size), io.BytesIO()
        RecordWriter(file).write(content)
        assert framed(content) == file.getvalue()


def loads(steps: int, seed: int = 0) -> NDArray[np.int64]:
    """(steps, 2, 4) rows; the second layer has three experts."""
    load_WLE = np.random.default_rng(seed).integers(0, 9, (steps, 2, 4))
    load_WLE[:, 1, 3] = 0
    return load_WLE


def attempt(run: Path, first: int, last: int) -> TensorBoardTracker:
    """Steps up to ``last`` after ``first`` of a run, collected every five steps."""
    tracker = TensorBoardTracker(run, first, print)
    for step in range(first + 1, last + 1):
        ragged = [load_E[:count].tolist() for load_E, count in zip(loads(40)[step - 1], (4, 3), strict=True)]
        tracker.step(record_of(step, ragged))
        if step % 5 == 0:
            tracker.flush()
    tracker.close()
    return tracker


def test_the_load_over_time_goes_on_after_a_restart(tmp_path: Path) -> None:
    """Steps 1 to 20, again from 10, and from 30: each column of five steps once, by the shares of these steps."""
    attempt(tmp_path, 0, 20)
    attempt(tmp_path, 10, 35)
    with next(tmp_path.iterdir()).open("ab") as file:
        file.write(b"torn")
    resumed = attempt(tmp_path, 30, 40)
    board = read_board(tmp_path)
    share_WLE = loads(40) / np.maximum(loads(40).sum(axis=2, keepdims=True), 1)
    expected = share_WLE.reshape(8, 5, 2, 4).mean(axis=1)
    (last,) = [event for event in board.Tensors(LOAD_SHARE) if event.step == 40]
    shown_LE = make_ndarray(last.tensor_proto)
    np.testing.assert_allclose(np.nan_to_num(shown_LE), expected[-1], atol=1e-3)
    assert np.isnan(shown_LE).tolist() == [[False] * 4, [False] * 3 + [True]], "no such expert"
    last_steps, share_CLE = resumed._history.shares()
    assert last_steps.tolist() == list(range(5, 41, 5))
    np.testing.assert_allclose(np.nan_to_num(share_CLE), expected, atol=1e-3)
    for tag in ("experts/load", "experts/load_over_time", "experts/load_by_layer", "experts/effective_over_time"):
        assert [event.step for event in board.Images(tag)][-1] == 40, "drawn at the end of short runs"
    assert steps_of(board, "experts/effective_mean") == list(range(1, 41))


def test_a_long_history_is_bounded_and_keeps_its_axis() -> None:
    """Every expert has its turn of a hundred steps; columns are merged, and the picture still shows who had which."""
    history = LoadHistory()
    for step in range(10, 10_001, 10):
        turn = (step - 1) // 100 % 4
        history.add(step, np.repeat(np.eye(4)[turn][None, None], 10, axis=0))
        history.end_column()
    last_steps, share_CLE = history.shares()
    assert len(last_steps) <= MAX_COLUMNS + 1
    assert last_steps[-1] == 10_000
    shown_EC = over_time(last_steps, share_CLE[:, 0], 180)
    steps = [int(name) for name in step_names(10_000, 180)]
    assert (steps[0], steps[-1], shown_EC.shape) == (1, 10_000, (4, 180))
    turns = [(step - 1) // 100 % 4 for step in steps]
    assert np.mean(shown_EC.argmax(axis=0) == turns) > 0.8, "but for steps at the edge of a turn"
    np.testing.assert_allclose(shown_EC.sum(axis=0), 1, atol=1e-2)


def test_at_most_60_curves_at_60_layers_of_256_experts_and_15_domains(tmp_path: Path) -> None:
    tracker, rng = TensorBoardTracker(tmp_path, 0, print), np.random.default_rng(0)
    by_layer = {f"layers.{number}.moe": float(number) for number in range(60)}
    metrics: dict[str, Any] = {
        "loss": 1.0,
        "perplexity": 2.0,
        "bits_per_byte": 1.0,
        "active_experts": 2.0,
        "effective_experts": 30.0,
    }
    metrics |= {"dead_experts": 0, "effective_experts_by_layer": by_layer, "dead_experts_by_layer": by_layer}
    metrics |= {f"bits_per_byte_domain{number}": number / 10 for number in range(15)}
    for step in (1, 2):
        record = record_of(step, rng.multinomial(5000, np.ones(256) / 256, size=60).tolist())
        tracker.step(record | {"ce": 1.0, "load_balance": 1.0, "z_loss": 1.0})
    for part in ("validation", "test"):
        tracker.metrics(part, metrics, 2)
    placement = ("imbalance_before", "imbalance_after", "imbalance_bound", "moved_experts", "bytes")
    tracker.metrics("placement", dict.fromkeys(placement, 1.0), 2)
    tracker.metrics("swap_search", dict.fromkeys(("loss_before", "loss_after", "swaps", "verified"), 1.0), 2)
    tracker.close()
    tags = read_board(tmp_path).Tags()
    assert len(tags["scalars"]) <= 60
    assert len(tags["images"]) <= 12
    for name in ("bits_per_byte_by_part", "effective_experts_by_layer", "dead_experts_by_layer"):
        assert {f"validation/{name}", f"test/{name}"} <= set(tags["images"])
    charted = {tag for charts in LAYOUT.values() for _, every in charts.values() for tag in every if "*" not in tag}
    assert charted <= set(tags["scalars"])


def test_text_meanings_and_hyperparameters(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, 0, print)
    tracker.step({"step": 1, "lr": 0.5})
    tracker.text("command", "`dist-moe train`", 1)
    tracker.hyperparameters({"model.gate.name": "top_k", "seed": 3, "data.shuffled": True})
    tracker.close()
    board = read_board(tmp_path)
    assert board.SummaryMetadata("optimizer/lr").summary_description == TAGS["lr"][1]
    assert board.Tensors("command/text_summary")[0].tensor_proto.string_val == [b"`dist-moe train`"]
    content = board.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    values = parse_session_start_info_plugin_data(content).hparams
    assert values["model.gate.name"].string_value == "top_k"
    assert (values["seed"].number_value, values["data.shuffled"].string_value) == (3, "true")


def test_the_server_that_tensorboard_starts_shows_the_meanings(tmp_path: Path) -> None:
    """It drops the description of a number without a class of data."""
    tracker = TensorBoardTracker(tmp_path / "run", 0, print)
    tracker.step(record_of(1, [[1, 2]]))
    tracker.close()
    with served(tmp_path) as provider:
        shown = provider.list_scalars(None, experiment_id="", plugin_name="scalars")["run"]
    assert {tag: one.description for tag, one in shown.items()} == dict(TAGS.values())


def field_of(panel: Panel) -> NDArray[np.int64]:
    """The pixels of a panel's field, and of what is to the right of it."""
    left, _, scale = layout([panel])
    assert scale == 1
    return np.asarray(draw([panel]))[46 : 46 + panel.height, left:].astype(int)


def test_a_picture_has_the_colours_of_its_numbers() -> None:
    """A lighter colour for a larger number, white for none; bars as high as their numbers."""
    values = np.array([[0.0, 1.0], [2.0, np.nan]])
    panel = HeatMap(values, "title", "row", "column", "unit", nothing="no row")
    _, w, _ = layout([panel])
    cells = [field_of(panel)[panel.height * y // 4, w * x // 4] for y in (1, 3) for x in (1, 3)]
    assert cells[0].sum() < cells[1].sum() < cells[2].sum() < cells[3].sum() == 3 * 255
    bars = Bars(np.array([1.0, 4.0]), "title", "column", "unit", line=2.0)
    _, w, _ = layout([bars])
    drawn = [(field_of(bars)[:, w * place // 4] == (49, 104, 142)).all(axis=1).sum() for place in (1, 3)]
    assert drawn[0] == pytest.approx(bars.height / 4, abs=3)
    assert drawn[1] == pytest.approx(bars.height, abs=3)
    named = NamedBars({"first": 1.0, "second": 2.0}, "title")
    _, w, _ = layout([named])
    lengths = [(field_of(named)[18 * i + 8] == (49, 104, 142)).all(axis=1).sum() for i in (0, 1)]
    assert lengths == [pytest.approx(w / 2, abs=2), pytest.approx(w, abs=2)]
    with pytest.raises(ValueError, match="at least one"):
        draw([])


@pytest.mark.parametrize("experts", [4, 16, 256])
def test_a_card_of_350_pixels_keeps_every_stroke_of_a_picture(experts: int) -> None:
    """TensorBoard takes single pixels of what is too wide: words and the dashed line are still there."""
    load_E = np.full(experts, 0.5)
    load_E[0] = 2.0
    bars = Bars(load_E, "MoE layer 0", "expert", "rows, times the mean", line=1.0)
    heat = HeatMap(np.ones((2, experts)), "load", "MoE layer", "expert", "times the mean load")
    image = draw([bars, heat])
    assert image.width % 350 == 0
    card = np.asarray(image.resize((350, image.height * 350 // image.width), Image.Resampling.NEAREST)).min(axis=2)
    at_once = np.asarray(draw([replace(bars, values=load_E[:4]), replace(heat, values=np.ones((2, 4)))])).min(axis=2)
    left, w, _ = layout([bars, heat])
    dashed = card[46 + bars.height // 2 - 1 : 46 + bars.height // 2 + 2, left + w // 2 : left + w]
    assert (dashed.min(axis=0) < 60).sum() > w // 6, "dashes, as long as the gaps between them"
    header, expected = ((picture[:40] < 128).sum() for picture in (card, at_once))
    assert header == pytest.approx(expected, rel=0.25), "as much ink as in a picture that is a card wide"


def test_names_in_pictures_can_be_told_apart() -> None:
    layers = [f"encoder.layers.{number}.feed_forward.moe" for number in range(6)]
    assert short_names(layers) == [f"layers.{number}" for number in range(6)]
    assert short_names(["layers.1.moe", "layers.3.moe"]) == ["layers.1", "layers.3"]
    assert short_names(["a.b", "a.b.c"]) == ["a.b", "a.b.c"]
    for alone in (["science_fiction", "romance"], ["encoder.moe"], ["moe", "moe"]):
        assert short_names(alone) == alone
    bars = NamedBars(dict.fromkeys(layers, 1.0), "effective_experts_by_layer")
    left, _, _ = layout([bars])
    rows = np.split(np.asarray(draw([bars]))[46 : 46 + bars.height, :left], 6)
    assert len({row.tobytes() for row in rows}) == 6
    assert fitted("science_fiction", 130) == "science_fiction", "the longest domain of Brown is not cut"
    assert fitted("a_domain_of_texts_whose_name_is_long", 130) == "a_domain_…_is_long"


def test_the_last_evaluation_is_drawn_at_the_end(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, 0, print)
    for step in (20, 40, 60):
        tracker.metrics("validation", {"recall_by_layer": {"first": step / 100, "second": 0.5}}, step)
    tracker.close()
    tracker = TensorBoardTracker(tmp_path, 60, print)
    tracker.close()
    events = read_board(tmp_path).Images("validation/recall_by_layer")
    assert [event.step for event in events] == [20, 60]


def test_a_table_s_picture_and_its_curve_count_the_same_rows_as_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """From where the search began, not from slot i -> expert i."""
    torch.manual_seed(0)
    search, shown, recorded = PermutationSearch(4, stage_steps=1), [], []
    search.begin_step()
    with torch.no_grad():
        search.table.copy_(search.start)
        search.table[0, 0, :2] = search.start[0, 0, :2].flip(0)
    monkeypatch.setattr("dist_moe.engine.monitor.tables.record", lambda name, value: recorded.append(value))
    monitor = SimpleNamespace(picture=lambda name, panels, step: shown.extend(panels))
    trainer: Any = SimpleNamespace(tables={"moe": search}, layers=[], step=1, monitor=monitor)
    pictures = RouterPictures()
    pictures.on_start(trainer)
    pictures.after_step(trainer, 1)
    pictures.on_end(trainer)
    assert recorded == [2.0]
    assert [panel.title for panel in shown] == ["moe: 2 of 4 rows changed"]
    assert search.start.tolist() != [[[0, 1, 2, 3]]]
