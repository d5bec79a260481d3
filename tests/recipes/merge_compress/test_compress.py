"""dist-moe compress, as people use it, on a tiny language model; and on models of other kinds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_moe.engine.checkpoint import read_model, write_first_checkpoint
from dist_moe.engine.checkpoint.files import newest_checkpoint
from dist_moe.recipes import load_config
from tests.data.labelled_text.tiny_texts import write_messages
from tests.helpers.commands import dist_moe, succeed
from tests.helpers.runs import largest_difference, summary_of, tensors_of, write_config
from tests.helpers.text_runs import write_encoder, write_text_config
from tests.helpers.texts import write_lm_config

EXPERTS, LAYERS = 8, ("layers.1.moe", "layers.3.moe")
MODEL = {"num_experts": EXPERTS, "gate": {"name": "top_k", "k": 2, "balance_weight": 0.1}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_text: dict[str, str]) -> Path:
    """Trained with its experts on two ranks."""
    root = tmp_path_factory.mktemp("compress")
    config = write_lm_config(root, tiny_text, model=MODEL, train={"max_steps": 30})
    succeed(2, "train", config, "--run-dir", root / "run", "parallel.expert_parallel_size=2")
    return root / "run"


@pytest.fixture(scope="module")
def planted(run: Path) -> Path:
    """The run with expert e + 4 made a copy of expert e, its hidden units in a random order."""
    weights, copy = read_model(newest_checkpoint(run)), run.with_name("planted")
    axis_of = {"up": 1, "gate": 1, "down": 0}

    def read(name: str, expert: int | None) -> Tensor:
        if expert is None or expert < 4:
            return weights.read(name, expert)
        generator = torch.Generator().manual_seed(expert)
        order_H = torch.randperm(12, generator=generator)
        return weights.read(name, expert - 4).index_select(axis_of[name.rpartition(".")[2]], order_H)

    write_first_checkpoint(replace(weights, read=read), copy / "checkpoints", "a test", weights.identity)
    for file in ("config.yaml", "identity.json"):
        (copy / file).write_bytes((run / file).read_bytes())
    return copy


def compress(world: int, source: Path, output: Path, *arguments: object) -> dict[str, Any]:
    succeed(world, "compress", source, output, *arguments)
    report: dict[str, Any] = json.loads((output / "compress.json").read_text())
    return report


def loss_of(run: Path, world: int = 1) -> float:
    return float(json.loads(succeed(world, "evaluate", run, "--json")[0].out)["test"]["loss"])


def test_planted_copies_are_merged_without_loss(planted: Path, tmp_path: Path) -> None:
    """At one rank and at two the same groups and the same weights; gates stay to the bit."""
    reports = {
        world: compress(world, planted, tmp_path / str(world), "--experts", 4, "--method", "hc_smoe")
        for world in (1, 2)
    }
    for report in reports.values():
        assert [sorted(layer["groups"]) for layer in report["layers"]] == [[[e, e + 4] for e in range(4)]] * 2
        assert [layer["layer"] for layer in report["layers"]] == list(LAYERS)
    assert [layer["leaders"] for layer in reports[1]["layers"]] == [layer["leaders"] for layer in reports[2]["layers"]]
    for layer in (0, 1):
        assert reports[1]["layers"][layer]["usage"] == pytest.approx(reports[2]["layers"][layer]["usage"], abs=1e-9)
    one, two, before = (tensors_of(directory) for directory in (tmp_path / "1", tmp_path / "2", planted))
    assert largest_difference(one, two) < 1e-7
    for name, tensor in before.items():
        if ".experts." not in name and ".slot_map." not in name:
            assert one[name].equal(tensor), name
    expected = loss_of(planted)
    assert loss_of(tmp_path / "1") == pytest.approx(expected, abs=1e-6)
    assert loss_of(tmp_path / "2", 2) == pytest.approx(expected, abs=1e-6)
    given = tmp_path / "given.yaml"
    given.write_text(f"groups: {[[[e, e + 4] for e in (2, 0, 3, 1)]] * 2}\nalign_by: activations\n")
    ours = compress(2, planted, tmp_path / "given", "--options", given)
    assert ours["layers"] == reports[2]["layers"]
    assert loss_of(tmp_path / "given") == pytest.approx(expected, abs=1e-6)
    plain = compress(1, planted, tmp_path / "plain", "--experts", 4, "--method", "hc_smoe", "align=none")
    assert plain["layers"] == reports[1]["layers"]
    assert abs(loss_of(tmp_path / "plain") - expected) > 1e-5, "not aligned"


@pytest.mark.parametrize("method", ["m_smoe", "uniform", "random", "prune_usage", "reap"])
def test_every_method_gives_a_run_that_evaluates_and_trains_on(run: Path, tmp_path: Path, method: str) -> None:
    """Global groups may leave numbers of experts that two ranks cannot share: one rank has them all then."""
    report = compress(2, run, tmp_path / "out", "--experts", 4, "--method", method, "examples=40", "similarity=outputs")
    groups = [layer["groups"] for layer in report["layers"]]
    assert sum(map(len, groups)) == 8
    tensors, before = tensors_of(tmp_path / "out"), tensors_of(run)
    assert report["parameters_after"] == parameters_in(tensors)
    assert report["parameters_before"] - report["parameters_after"] == 8 * 3 * 16 * 12
    prunes = method in ("prune_usage", "reap")
    for layer, of_layer in zip(LAYERS, groups, strict=True):
        assert sorted(e for group in of_layer for e in group) == list(range(EXPERTS)) or prunes
        table_S = tensors[f"{layer}.slot_map.table|buffer"].flatten()
        for new, group in enumerate(of_layer):
            assert table_S[group].tolist() == [new] * len(group)
            if len(group) == 1:
                ours, theirs = (f"{layer}.experts.down|master|{expert}" for expert in (new, group[0]))
                assert tensors[ours].equal(before[theirs])
        if prunes:
            mask_S = tensors[f"{layer}.gates.0.allowed_E|buffer"]
            assert mask_S.nonzero().flatten().tolist() == [group[0] for group in of_layer]
    assert loss_of(tmp_path / "out", 2) == pytest.approx(loss_of(tmp_path / "out"), abs=1e-5)
    succeed(2, "train", "--resume", tmp_path / "out", "train.max_steps=2", "train.validate_every=1")
    test = summary_of(tmp_path / "out")["test"]
    assert test["dead_experts"] <= 8
    if prunes:
        assert tensors_of(tmp_path / "out")[f"{LAYERS[0]}.gates.0.allowed_E|buffer"].sum() == len(groups[0])


def parameters_in(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for name, tensor in tensors.items() if "|master" in name)


def test_a_compressed_run_is_compressed_again(run: Path, tmp_path: Path) -> None:
    report = compress(1, run, tmp_path / "first", "--experts", 4, "examples=40", "excluded_layers=[1]")
    assert [len(layer["groups"]) for layer in report["layers"]] == [4, 8]
    compress(1, tmp_path / "first", tmp_path / "second", "--experts", 3, "--grouping", "uniform", "examples=40")
    (table_S, _) = (tensors_of(tmp_path / "second")[f"{layer}.slot_map.table|buffer"].flatten() for layer in LAYERS)
    first_S = tensors_of(tmp_path / "first")[f"{LAYERS[0]}.slot_map.table|buffer"].flatten()
    assert sorted(set(first_S.tolist())) == [0, 1, 2, 3]
    assert sorted(set(table_S.tolist())) == [0, 1, 2]
    assert all(len(set(table_S[first_S == expert].tolist())) == 1 for expert in range(4))
    third = compress(1, tmp_path / "first", tmp_path / "third", "--experts", 5, "excluded_layers=[0]", "examples=40")
    assert [len(layer["groups"]) for layer in third["layers"]] == [4, 5]
    for arguments, part in ((["--grouping", "uniform"], f"{LAYERS[0]} has 4"), ([], "the model has 6 a layer")):
        (outcome,) = dist_moe(1, "compress", tmp_path / "first", tmp_path / "no", "--experts", 7, *arguments)
        assert outcome.code == 2
        assert part in outcome.err


def test_experts_that_never_share_a_token_are_not_compared_by_the_router(
    tmp_path: Path, tiny_text: dict[str, str]
) -> None:
    """Hash routing has no logits, and gives each token to one expert: all cosines are 0."""
    config = write_lm_config(tmp_path, tiny_text, model={"gate": {"name": "hash"}}, train={"max_steps": 2})
    succeed(1, "train", config, "--run-dir", tmp_path / "run")
    first, second = dist_moe(2, "compress", tmp_path / "run", tmp_path / "out", "--experts", 2)
    assert (first.code, second.code) == (2, 2)
    assert "similarity=outputs" in first.err
    assert not (tmp_path / "out").exists()
    (outcome,) = dist_moe(1, "compress", tmp_path / "run", tmp_path / "out", "--experts", 2, "similarity=router_rows")
    assert outcome.code == 2
    assert "similarity=router_rows: gate.name=hash has no rows" in outcome.err
    compress(1, tmp_path / "run", tmp_path / "out", "--experts", 2, "similarity=weights", "align_by=activations")


def test_a_recommender_with_a_permutation_and_two_gates(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    config = write_config(tmp_path, tiny_data, train={"max_steps": 20}, model={"permutation": {"epochs": 0.2}})
    succeed(1, "train", config, "--run-dir", tmp_path / "run")
    compress(1, tmp_path / "run", tmp_path / "same", "--experts", 4)
    compress(1, tmp_path / "run", tmp_path / "out", "--experts", 2, "--method", "hc_smoe")
    assert loss_of(tmp_path / "same") == pytest.approx(loss_of(tmp_path / "run"), abs=1e-6)
    assert len(tensors_of(tmp_path / "out")["moe.slot_map.table|buffer"].unique()) == 2
    assert loss_of(tmp_path / "out") > 0


ALIGN = ("align_by=activations", "similarity=router_rows")


def test_a_bert_is_compressed_by_its_real_tokens(tmp_path: Path) -> None:
    data = {"name": "sms-spam", "root": str(write_messages(tmp_path / "messages"))}
    model = {"moe_every": 1, "expert_hidden": 16, "gate": {"name": "top_k", "k": 2}}
    start = {"conversion": {"method": "copies", "noise": 0.5}}
    encoder = write_encoder(tmp_path / "encoder")
    config = write_text_config(tmp_path, encoder, data, model=model, start=start, train={"max_steps": 2})
    succeed(1, "train", config, "--run-dir", tmp_path / "run")
    report = compress(2, tmp_path / "run", tmp_path / "out", "--experts", 2, "part=val", "examples=10000")
    task = load_config(tmp_path / "run" / "config.yaml").data.open(progress=False)
    every = np.arange(len(task.val))
    assert [layer["tokens"] for layer in report["layers"]] == [int(task.val.batch(every, every).inputs[1].sum())] * 2
    assert sum(len(layer["groups"]) for layer in report["layers"]) == 4
    unequal = compress(1, tmp_path / "run", tmp_path / "unequal", "--experts", 2, "excluded_layers=[0]", *ALIGN)
    assert [len(layer["groups"]) for layer in unequal["layers"]] == [4, 2]
    assert loss_of(tmp_path / "unequal", 2) == pytest.approx(loss_of(tmp_path / "unequal"), abs=1e-6)
    succeed(2, "train", "--resume", tmp_path / "unequal", "parallel.expert_parallel_size=2")
    banks = ["encoder.layers.0.feed_forward.moe.experts.up", "encoder.layers.1.feed_forward.moe.experts.up"]
    assert [read_model(newest_checkpoint(tmp_path / "unequal")).specs[bank].shape[0] for bank in banks] == [4, 2]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--experts", 9], ["experts=9", "has 8"]),
        (["--experts", 1], ["experts"]),
        (["--experts", 4, "--method", "reap", "--grouping", "global"], ["grouping=global", "method=reap"]),
        (["--experts", 4, "--method", "smoe"], ["method", "smoe", "hc_smoe"]),
        (["--experts", 4, "excluded_layers=[2]"], ["excluded_layers=[2]", "0..1"]),
        (["--experts", 4, "excluded_layers=[0, 1]"], ["excluded_layers=[0, 1]", "not all"]),
        (["--experts", 4, "similarty=outputs"], ["did you mean similarity?"]),
        (["--experts", 4, "experts=3"], ["--experts 4 and experts=3", "one of them"]),
        (["--experts", 4, "--recover", "merge=null", "compress.rank=2"], ["merge=null", "leave out experts=4"]),
        (["--experts", 4, "--recover", "source=other"], ["source"]),
        (["--experts", 4, "compress.rank=2"], ["compress.rank=2", "--recover"]),
        ([], ["experts=N", "groups=[[[0, 1], ...], ...]"]),
        (["--experts", 4, "groups=[[[0, 1]]]"], ["experts=N", "groups=[[[0, 1], ...], ...]"]),
        (["--method", "reap", "groups=[[[0, 1]]]"], ["groups", "not reap"]),
        (["groups=[[[0, 1, 2, 3, 4, 5, 6, 7]]]"], ["of 1 layers", "has 2"]),
        (["groups=[[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1, 2, 3], [4, 5, 6, 6]]]"], ["groups[1]", "experts 0 to 7 must"]),
        (["groups=[[[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2, 3, 4, 5, 6, 7]]]"], ["groups", "at least 2"]),
    ],
)
def test_refusals(run: Path, tmp_path: Path, arguments: list[object], parts: list[str]) -> None:
    (outcome,) = dist_moe(1, "compress", run, tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert all(part in outcome.err for part in parts), outcome.err
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_the_seed_is_that_of_random_groups(run: Path, tmp_path: Path) -> None:
    options = ["--experts", 4, "--method", "random", "examples=8"]
    groups = [
        [layer["groups"] for layer in compress(1, run, tmp_path / str(seed), *options, f"seed={seed}")["layers"]]
        for seed in (0, 1)
    ]
    assert groups[0] != groups[1]


def test_a_used_output_is_refused_by_every_rank(run: Path) -> None:
    first, second = dist_moe(2, "compress", run, run, "--experts", 4)
    assert (first.code, second.code) == (2, 2)
    assert f"OUT {run} holds a run already" in first.err


def test_nothing_is_written_within_the_run(run: Path) -> None:
    (outcome,) = dist_moe(1, "compress", run, run / "checkpoints" / "fewer", "--experts", 4)
    assert outcome.code == 2
    assert "name a directory beside it" in outcome.err
    assert not (run / "checkpoints" / "fewer").exists()
