"""A wrong configuration: exit code 2, and a message that names the field, the value and what is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_moe.cli.main import main

from .conftest import Refused


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed=-1", ["seed=-1", "greater than or equal to 0"]),
        ("train.batch_size=abc", ["train.batch_size='abc'", "integer"]),
        ("train.batch_size=", ["gives no value", "train.batch_size=null"]),
        ("train.max_steps=0", ["train.max_steps=0", "greater than or equal to 1"]),
        ("train=[]", ["train=[]", "mapping"]),
        ("model.experts.dropout=1", ["model.experts.dropout=1", "less than 1"]),
        ("model.experts.dropout=high", ["model.experts.dropout='high'", "number"]),
        ("model.num_experts=1", ["model.num_experts=1", "greater than or equal to 2"]),
        ("model.gate.gamma=0", ["model.gate.gamma=0", "greater than 0"]),
        ("model.gate.k=2.5", ["model.gate.k=2.5", "integer"]),
        ("model.gate.k=5", ["model.gate.k=5", "num_experts=4", "1..4"]),
        ("model.num_slots=1", ["model.num_slots=1", "greater than or equal to 2"]),
        ("model={num_slots: 7, gate: {name: top_k, k: 8}}", ["model.gate.k=8", "num_slots=7", "1..7"]),
        (
            "model={num_slots: 7, permutation: {}}",
            ["model.num_slots=7 is not num_experts=16", "set num_slots or permutation to null"],
        ),
        ("model.gate.name=tree", ["model.gate", "model.gate.name='tree' is not a gate", "comet", "hash", "top_k"]),
        ("model.gate={name: smoe_dropout, k_max: 5}", ["model.gate.k_max=5", "num_experts=4", "1..4"]),
        ("model.gate={name: smoe_dropout, k_min: 3, k_max: 2}", ["model.gate.k_min=3", "k_max=2"]),
        ("model.gate={name: ada_moe, k: 9, null_slots: 4}", ["model.gate.k=9", "null_slots=8", "1..8"]),
        ("model.gate={name: comet, lazy: true, static: true}", ["model.gate.lazy=true", "static=true"]),
        ("model.gate={name: softmax, k: 2}", ["model.gate.k=2", "no such field"]),
        ("model.permutation.forward=firm", ["model.permutation.forward='firm'", "'soft' or 'hard'"]),
        ("model.name=classifier", ["model.name='classifier' is not a model", "recommender", "two_image_classifier"]),
        ("model={name: two_image_classifier}", ["model.name=two_image_classifier", "movielens-1m", "use recommender"]),
        ("target_weights=[-1, 1]", ["target_weights.0=-1", "greater than or equal to 0"]),
        ("target_weights=[1, .nan]", ["target_weights.1=nan"]),
        ("target_weights=[1]", ["target_weights=[1.0]", "give 2 weights"]),
        ("watched_weight=0.5", ["watched_weight=0.5", "did you mean target_weights?"]),
        ("swap_search.max_swaps=-1", ["swap_search.max_swaps=-1"]),
        ("train.patience=0", ["train.patience=0", "greater than or equal to 1"]),
        ("imports=[no_such_module_anywhere]", ["imports", "'no_such_module_anywhere'"]),
        ("data=5", ["data=5", "mapping"]),
        ("data=[]", ["data=[]", "mapping"]),
        ("model=[]", ["model=[]", "mapping"]),
        (
            "data.name=movielens-20m",
            ["data.name='movielens-20m' is not a data set", "did you mean movielens-1m"],
        ),
        ("deepspeed=5", ["deepspeed=5", "mapping"]),
        ("parallel.expert_parallel_size=0", ["parallel.expert_parallel_size=0", "greater than or equal to 1"]),
        ("parallel.exchange=three_level", ["parallel.exchange='three_level'", "'auto', 'flat' or 'two_level'"]),
        ("parallel.ranks_per_node=0", ["parallel.ranks_per_node=0", "greater than or equal to 1"]),
        ("train.bach_size=3", ["train.bach_size=3", "did you mean train.batch_size?"]),
        ("model.gate.gama=3", ["model.gate.gama=3", "did you mean model.gate.gamma?"]),
        ("modle.dropout=0", ["modle", "did you mean model?"]),
        ("nonsense=1", ["nonsense=1", "no such field", "dist-moe config --fields"]),
        ("train={epochs: .inf, max_steps: 0}", ["train.epochs=inf", "train.max_steps=0"]),  # both are named at once
        ("model.gate.gamma=.inf", ["model.gate.gamma"]),
        ("model.gate.entropy_weight=.inf", ["model.gate.entropy_weight"]),
        ("model.permutation.epochs=.inf", ["model.permutation.epochs"]),
        ("model.permutation.entropy_weight=.inf", ["model.permutation.entropy_weight"]),
        ("model.permutation.temperature=[0, 0]", ["model.permutation.temperature"]),
        ("model.permutation.temperature=[-1, 1]", ["model.permutation.temperature"]),
        ("model.permutation.iterations=[-1, 5]", ["model.permutation.iterations"]),
        ("train.max_steps", ["'train.max_steps' is not of the form key=value"]),
        ("=5", ["'=5' is not of the form key=value"]),
        ("seed=[1,", ["'seed=[1,' is not YAML"]),
    ],
)
def test_an_override_that_is_not_valid(refused: Refused, config: Path, override: str, parts: list[str]) -> None:
    refused(["train", config, override], *parts)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("def gate(:\n", "SyntaxError"),
        ("raise ArithmeticError('no gate')\n", "ArithmeticError: no gate; fix the module"),
        ("raise SystemExit(3)\n", "SystemExit: 3; fix the module"),
        ("import a_library_that_is_not_here\n", "install a_library_that_is_not_here"),
    ],
)
def test_a_module_of_the_user_s_that_is_broken(
    refused: Refused, config: Path, tmp_path: Path, content: str, reason: str
) -> None:
    (tmp_path / "a_broken_gate.py").write_text(content)
    refused(["train", config, "imports=[a_broken_gate]"], "imports: the module 'a_broken_gate'", reason)


@pytest.mark.parametrize("module", ["a_gate_left_behind", "a_package_left_behind.gate"])
def test_a_run_away_from_the_module_that_it_imports(refused: Refused, tmp_path: Path, module: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"imports: [{module}]\n")
    where = f"start from the directory that holds {module.partition('.')[0]}, or put that directory on PYTHONPATH"
    refused(["evaluate", tmp_path / "run"], f"the module '{module}'", str(tmp_path), where)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"model: {dropout: 0.5", "is not YAML"),
        (b"model:\n\tdropout: 0.5\n", "is not YAML"),
        (b"\xff\xfe\x00\x01", "is not YAML"),
        (b"just a sentence\n", "must hold 'key: value' pairs, not a str"),
        (b"- a\n- b\n", "must hold 'key: value' pairs, not a list"),
        (b"1: 2\n", "1"),
    ],
)
def test_a_file_that_is_not_a_configuration(refused: Refused, tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    refused(["train", path], part)
    refused(["config", path], part)


@pytest.mark.parametrize("override", ["data.name=movielens-20m", "data=5"])
def test_data_that_do_not_exist_are_the_only_fault(refused: Refused, config: Path, override: str) -> None:
    """The model, whose name comes from that of the data, is not blamed."""
    assert refused(["train", config, override]).count("\n  ") == 1


def test_a_file_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    refused(["train", tmp_path / "nothing.yaml"], str(tmp_path / "nothing.yaml"), "No such file")
    refused(["train", tmp_path], str(tmp_path), "Is a directory")


def test_neither_configuration_nor_run(refused: Refused, tmp_path: Path) -> None:
    refused(["train"], "--resume", "config --list")
    refused(["config"], "--fields")
    refused(["train", "--resume", tmp_path, "--run-dir", tmp_path], "--run-dir")


@pytest.mark.parametrize(
    ("world_size", "overrides", "parts"),
    [
        (
            2,
            ["model.num_experts=16", "parallel.expert_parallel_size=3"],
            ["parallel.expert_parallel_size=3", "2 rank(s)", "allowed: 1, 2"],
        ),
        (
            3,
            ["model.num_experts=16", "parallel.expert_parallel_size=3"],
            ["parallel.expert_parallel_size=3", "model.num_experts=16", "allowed: 1"],
        ),
        (1, ["parallel.expert_parallel_size=2"], ["parallel.expert_parallel_size=2", "1 rank(s)", "allowed: 1"]),
        (4, ["parallel.ranks_per_node=3"], ["parallel.ranks_per_node=3", "4 rank(s)", "allowed: 1, 2, 4"]),
        (
            6,
            [
                "model.num_experts=6",
                "parallel.expert_parallel_size=3",
                "parallel.ranks_per_node=2",
                "parallel.exchange=two_level",
            ],
            ["parallel.exchange=two_level", "parallel.expert_parallel_size=3", "2 rank(s) per node", "exchange=auto"],
        ),
        (3, [], ["train.batch_size=64", "3 rank(s)", "multiple of 3"]),
        (
            2,
            ["deepspeed.gradient_accumulation_steps=3"],
            ["train.batch_size=64", "2 rank(s)", "deepspeed.gradient_accumulation_steps=3", "multiple of 6"],
        ),
    ],
)
def test_a_layout_that_does_not_divide(
    refused: Refused,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    overrides: list[str],
    parts: list[str],
) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world_size}.items():
        monkeypatch.setenv(name, str(value))
    refused(["train", config, *overrides], *parts)


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"WORLD_SIZE": "2"}, ["RANK=None", "torchrun"]),
        ({"RANK": "0"}, ["WORLD_SIZE=None", "torchrun"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["LOCAL_RANK=None", "torchrun"]),
        ({"RANK": "one", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["RANK='one'", "not a number"]),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["RANK=2", "0..1", "WORLD_SIZE=2"]),
    ],
)
def test_an_environment_that_no_launcher_makes(
    refused: Refused, config: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], parts: list[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(["train", config], *parts)


def test_more_than_the_data_holds(refused: Refused, config: Path) -> None:
    message = refused(["train", config, "train.batch_size=1000000"], "train.batch_size=1000000", "training examples")
    assert re.search(r"\b5,?\d{3}\b", message)


def test_one_rank_speaks_for_a_machine(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(config), "seed=-1"]) == 2
    assert capsys.readouterr().err == ""


def test_a_layout_that_does_not_fit_the_emulated_ranks(refused: Refused, config: Path) -> None:
    """Told by the process that would start them."""
    arguments: list[object] = ["train", config, "--emulate", 2, "parallel.expert_parallel_size=4"]
    refused(arguments, "does not divide the 2 rank(s) of this job")
