"""Compression by low rank and pruned rows as people run it: stages, layouts, interruption, what is left."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_moe.recipes import load_config
from tests.data.labelled_text.tiny_texts import write_messages
from tests.helpers.commands import dist_moe, run_here, signalled, succeed
from tests.helpers.pool import on_ranks
from tests.helpers.runs import records_of, tensors_of, write_config
from tests.helpers.text_runs import write_encoder, write_text_config
from tests.helpers.texts import write_lm_config

MODEL = {"num_experts": 4, "gate": {"name": "top_k", "k": 2, "balance_weight": 0.1}}
STEPS, REMAINING = 12, 0.25
COMPRESS = {"rank": 3, "remaining": REMAINING, "warm_up": 3, "hold": 3}
LAYERS = ("layers.1.moe", "layers.3.moe")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_text: dict[str, str]) -> Path:
    root = tmp_path_factory.mktemp("source")
    config = write_lm_config(root, tiny_text, model=MODEL, train={"max_steps": 20})
    succeed(1, "train", config, "--run-dir", root / "run")
    return root / "run"


def write_recipe(path: Path, source: Path, train: dict[str, Any] | None = None, **recipe: Any) -> Path:
    content = {
        "recipe": {"name": "merge_compress", "source": str(source), "recover": None, "compress": COMPRESS} | recipe,
        "train": {"max_steps": STEPS, "validate_every": 6, "checkpoint_every": 5} | (train or {}),
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def compressed(source: Path) -> Path:
    """Experts as they are, factored, pruned while they follow the source, and dropped."""
    config = write_recipe(source.with_name("compress.yaml"), source)
    succeed(1, "train", config, "--run-dir", source.with_name("compressed"))
    return source.with_name("compressed")


def result_of(run: Path, stage: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "stages" / stage / "result.json").read_text())
    return result


def loss_of(path: Path, world: int = 1, *overrides: str) -> float:
    return float(json.loads(succeed(world, "evaluate", path, "--json", *overrides)[0].out)["test"]["loss"])


def rows_left(run: Path) -> dict[str, list[list[int]]]:
    """Ids of the rows of each S that are left, by expert."""
    ids = {name: tensor for name, tensor in tensors_of(run).items() if name.endswith("_row_ids|buffer")}
    return {name: [[i for i in row if i >= 0] for row in tensor.tolist()] for name, tensor in ids.items()}


def test_what_is_left_computes_the_same_and_takes_less(source: Path, compressed: Path) -> None:
    stages = compressed / "stages"
    assert loss_of(stages / "factor") == pytest.approx(loss_of(source), abs=1e-6)
    assert loss_of(stages / "drop") == pytest.approx(loss_of(stages / "prune"), abs=1e-6)
    assert loss_of(compressed) == loss_of(stages / "drop")
    left = rows_left(stages / "prune")
    rows = sum(4 * outputs for outputs in (12, 12, 16)) * 2  # of up, gate and down of four experts in two layers
    assert sum(len(ids) for of in left.values() for ids in of) == round(REMAINING * rows)
    assert rows_left(stages / "drop") == left
    shares = [record["rows_left"] for record in records_of(stages / "prune")]
    expected = [1.0] * 3 + [0.25 + 0.75 * (1 - (t - 3) / 6) ** 3 for t in range(4, 9)] + [0.25] * 4
    assert shares == pytest.approx([round(share * rows) / rows for share in expected])
    pruned = tensors_of(stages / "prune")
    for name, ids in pruned.items():
        if not name.endswith("_row_ids|buffer"):
            continue
        sparse = name.removesuffix("_row_ids|buffer") + "_sparse"
        for expert in range(4):
            states = [pruned[f"{sparse}|{state}|{expert}"] for state in ("master", "exp_avg", "exp_avg_sq")]
            gone = ids[expert] < 0
            assert not any(state[:, gone].any() for state in states)
            assert all(state[:, ~gone].any() for state in states) or gone.all()
    report, tensors = result_of(compressed, "drop"), tensors_of(stages / "drop")
    model = load_config(stages / "drop" / "config.yaml").model
    assert model.low_rank.rank == 3
    most = {name: max(map(len, ids)) for name, ids in left.items()}
    for layer, of_layer in zip(LAYERS, model.low_rank.rows, strict=True):
        assert of_layer == {m: most[f"{layer}.experts.{m}_row_ids|buffer"] for m in ("up", "gate", "down")}
        assert report["rows"][layer] == of_layer
    masters = {name: tensor.numel() for name, tensor in tensors.items() if "|master" in name}
    assert report["parameters_after"] == sum(masters.values()) < report["parameters_before"]
    stored = sum(number for name, number in masters.items() if "_sparse" in name)
    dims = {"up": (16, 12), "gate": (16, 12), "down": (12, 16)}
    alive = sum(
        len(ids) * dims[n.removesuffix("_row_ids|buffer").rpartition(".")[2]][0] for n, of in left.items() for ids in of
    )
    assert report["padding_after"] == stored - alive
    flops = sum(2 * (3 * sum(dims[m]) + dims[m][0] * count) for of in model.low_rank.rows for m, count in of.items())
    assert report["expert_flops_after"] == flops < report["expert_flops_before"]


LAYOUTS = {
    "ep 4": (4, ["parallel.expert_parallel_size=4"]),
    "zero 3": (2, ["deepspeed.zero_optimization={stage: 3, stage3_param_persistence_threshold: 0}"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_prunes_the_same_rows(source: Path, compressed: Path, tmp_path: Path, layout: str) -> None:
    world, options = LAYOUTS[layout]
    config = write_recipe(tmp_path / "config.yaml", source)
    succeed(world, "train", config, "--run-dir", tmp_path / "out", *options)
    assert rows_left(tmp_path / "out" / "stages" / "prune") == rows_left(compressed / "stages" / "prune")
    assert loss_of(tmp_path / "out") == pytest.approx(loss_of(compressed), abs=1e-4)
    assert loss_of(tmp_path / "out", world) == pytest.approx(loss_of(tmp_path / "out"), abs=1e-5)


def test_interrupted_while_it_prunes_it_goes_on_to_the_bit(source: Path, compressed: Path, tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "config.yaml", source)
    arguments = ["train", str(config), "--run-dir", str(tmp_path / "out")]
    (stopped,) = on_ranks(1, signalled, signal.SIGTERM, 6, 0, arguments)
    assert stopped.code == 128 + signal.SIGTERM
    assert not (tmp_path / "out" / "stages" / "drop").exists()
    succeed(1, "train", "--resume", tmp_path / "out")
    for stage in ("prune", "drop"):
        ours, theirs = (tensors_of(run / "stages" / stage) for run in (tmp_path / "out", compressed))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not ours[name].equal(theirs[name])] == []


def test_all_stages_then_what_is_left_is_a_run_as_any_other(source: Path, tmp_path: Path) -> None:
    """Merged, recovered, compressed with equally many rows in each matrix, recovered again; exported; planned."""
    compress = COMPRESS | {"scope": "matrix"}
    merge = {"experts": 2, "grouping": "uniform", "examples": 20}
    config = write_recipe(
        tmp_path / "config.yaml",
        source,
        {"max_steps": 8},
        merge=merge,
        recover={},
        compress=compress,
        recover_again=True,
    )
    out = tmp_path / "out"
    succeed(1, "train", config, "--run-dir", out)
    stages = {path.name for path in (out / "stages").iterdir()}
    assert stages == {"merge", "recover", "factor", "prune", "drop", "recover_again"}
    assert result_of(out, "drop")["padding_after"] == 0
    assert result_of(out, "drop")["rows"][LAYERS[0]] == {"up": 3, "gate": 3, "down": 4}
    tested = result_of(out, "recover_again")["test"]["loss"]
    assert loss_of(out, 2) == pytest.approx(tested, abs=1e-5)
    succeed(1, "export", out, tmp_path / "model.safetensors")
    assert loss_of(tmp_path / "model.safetensors") == pytest.approx(tested, abs=1e-6)
    last = out / "stages" / "recover_again"
    planned = succeed(1, "plan", last / "config.yaml", "--ranks", 2, "--json", "parallel.expert_parallel_size=2")
    experts = [t.numel() for n, t in tensors_of(last).items() if ".experts." in n and "|master" in n]
    assert json.loads(planned[0].out)["states"][0]["expert_parameters"] == 4 * sum(experts) // 2
    (outcome,) = dist_moe(1, "export", out, "--hf", tmp_path / "hf")
    assert (outcome.code, "low_rank" in outcome.err) == (2, True)
    (outcome,) = dist_moe(1, "compress", out, tmp_path / "again", "--experts", 2)
    assert (outcome.code, "merge them before" in outcome.err) == (2, True)


def test_a_bert_and_a_recommender(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    data = {"name": "sms-spam", "root": str(write_messages(tmp_path / "messages"))}
    model = {"moe_every": 1, "expert_hidden": 16, "gate": {"name": "top_k", "k": 2}}
    start = {"conversion": {"method": "copies", "noise": 0.5}}
    encoder = write_encoder(tmp_path / "encoder")
    bert = write_text_config(tmp_path / "bert", encoder, data, model=model, start=start, train={"max_steps": 2})
    recommender = write_config(tmp_path / "recommender", tiny_data, train={"max_steps": 2})
    for config in (bert, recommender):
        run, out = config.parent / "run", config.parent / "out"
        succeed(1, "train", config, "--run-dir", run)
        succeed(1, "train", write_recipe(config.parent / "compress.yaml", run), "--run-dir", out)
        assert loss_of(out / "stages" / "factor") == pytest.approx(loss_of(run), abs=1e-5)
        assert loss_of(out / "stages" / "drop") == pytest.approx(loss_of(out / "stages" / "prune"), abs=1e-5)


@pytest.mark.parametrize(
    ("recipe", "train", "parts"),
    [
        ({"compress": COMPRESS | {"rank": 13}}, {}, ["low_rank.rank=13", "use 12"]),
        ({"compress": COMPRESS | {"warm_up": 0.9}}, {}, ["recipe.compress", "warm_up=0.9"]),
        ({"recover": {"trained": "router"}}, {}, ["trained=router", "all_but_router"]),
        ({}, {"patience": 2}, ["train.patience=2"]),
        ({"recover_again": True}, {}, ["recover_again"]),
        ({"compress": None}, {}, ["nothing to do"]),
    ],
)
def test_refusals(
    source: Path, tmp_path: Path, recipe: dict[str, Any], train: dict[str, Any], parts: list[str]
) -> None:
    config = write_recipe(tmp_path / "config.yaml", source, train, **recipe)
    outcome = run_here(["train", str(config), "--run-dir", str(tmp_path / "out")])
    assert outcome.code == 2, outcome
    assert all(part in outcome.err for part in parts), outcome.err
    assert not (tmp_path / "out" / "config.yaml").exists()
