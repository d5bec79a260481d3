"""What the commands accept, print and explain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_moe.cli import main as cli
from dist_moe.cli.main import main
from dist_moe.recipes import recipe as plan

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What ``dist-moe train`` asked to be planned; nothing is trained."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(plan, "plan_new_run", lambda *arguments: calls.append(("new", *arguments)))
    monkeypatch.setattr(plan, "plan_resumed_run", lambda *arguments, **_: calls.append(("resume", *arguments)))
    monkeypatch.setattr("dist_moe.cli.train._train", lambda _: 0)
    return calls


@pytest.mark.parametrize(
    "arguments",
    [
        "c.yaml --run-dir here seed=1 model.experts.dropout=0",
        "c.yaml seed=1 model.experts.dropout=0 --run-dir here",
        "--run-dir here c.yaml seed=1 model.experts.dropout=0",
        "c.yaml seed=1 --run-dir here model.experts.dropout=0",
    ],
)
def test_options_and_overrides_in_any_order(planned: list[tuple[Any, ...]], arguments: str) -> None:
    assert main(["train", *arguments.split()]) == 0
    assert planned == [("new", Path("c.yaml"), ["seed=1", "model.experts.dropout=0"], Path("here"))]


def test_what_the_deepspeed_launcher_adds(planned: list[tuple[Any, ...]]) -> None:
    assert main(["--local_rank=1", "train", "c.yaml", "seed=1"]) == 0
    assert planned[0][1:3] == (Path("c.yaml"), ["seed=1"])


def test_a_resumed_run_takes_overrides(planned: list[tuple[Any, ...]], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert main(["train", "--resume", str(tmp_path), "train.max_steps=9", "seed=2"]) == 0
    assert planned == [("resume", tmp_path, ["train.max_steps=9", "seed=2"])]


def test_data_root_is_an_override(planned: list[tuple[Any, ...]]) -> None:
    assert main(["train", "c.yaml", "--data-root", "some where"]) == 0
    assert planned[0][2] == ['data.root="some where"']


def test_run_directory_is_named_after_the_configuration(planned: list[tuple[Any, ...]]) -> None:
    assert main(["train", "configs/small.yaml"]) == 0
    assert planned[0][3] == Path("runs/small")


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "c.yaml", "--steps", "3"])
    assert stopped.value.code == 2
    assert "--steps" in capsys.readouterr().err


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_is_worth_reading(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "evaluate", "config", "data"):
        assert command in help_of(capsys)
    text = help_of(capsys, "train")
    for topic in (
        "overrides",
        "train.max_steps=",
        "train.batch_size=",
        "model.experts.dropout=",
        "parallel.expert_parallel_size=",
        "deepspeed.",
        "torchrun",
        "torchx run",
        "--resume",
        "--run-dir",
        "--data-root",
        "SIGTERM",
        "Exit code 2",
    ):
        assert topic in text, topic


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    assert main(["config", str(path)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    assert shown["deepspeed"] == written["deepspeed"]
    assert any(count >= 2 for name, count in shown["model"].items() if name.endswith("_experts"))


def test_a_shown_configuration_is_itself_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", str(CONFIGS[0]), "model.dropout=0.25", "seed=7"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(first)
    assert main(["config", str(tmp_path / "shown.yaml")]) == 0
    assert capsys.readouterr().out == first
    assert yaml.safe_load(first)["model"]["dropout"] == 0.25


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("0.25", 0.25), ("1.5E-2", 0.015)])
def test_numbers_as_people_write_them(capsys: pytest.CaptureFixture[str], text: str, value: float) -> None:
    assert main(["config", str(CONFIGS[0]), f"deepspeed.optimizer.params.lr={text}"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["deepspeed"]["optimizer"]["params"]["lr"] == value


@pytest.mark.parametrize(
    ("model", "overrides", "gate"),
    [
        ({"gate": "comet"}, ["model.gate.k=3"], {"name": "comet", "k": 3}),
        ({"gate": "top_k"}, ["model.gate.k=3"], {"name": "top_k", "k": 3}),
        ({"gate": "top_k"}, ["model.gate.name=dselect_k", "model.gate.gamma=3"], {"name": "dselect_k", "gamma": 3}),
        ({}, ["model.gate.k=3"], {"name": "comet", "k": 3}),
        (None, ["model.gate.k=3"], {"name": "comet", "k": 3}),
        ({"gate": {"k": 3}}, ["model.gate.gamma=2"], {"name": "comet", "k": 3, "gamma": 2}),
    ],
)
def test_a_gate_s_field_wherever_its_name_stands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Any, overrides: list[str], gate: dict[str, Any]
) -> None:
    """A gate given by its name alone, or left out: then it is the default one."""
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({} if model is None else {"model": model}))
    assert main(["config", str(tmp_path / "short.yaml"), *overrides]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)["model"]["gate"]
    assert {field: shown[field] for field in gate} == gate


def objects_of(schema: Any) -> list[dict[str, Any]]:
    """Every description of a section, wherever it is: gates are described where they are used."""
    if isinstance(schema, list):
        return [section for part in schema for section in objects_of(part)]
    if not isinstance(schema, dict):
        return []
    within = [section for part in schema.values() for section in objects_of(part)]
    return [schema, *within] if isinstance(schema.get("properties"), dict) else within


def test_schema_is_json_and_names_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    from dist_moe.config.listing import fields_of
    from dist_moe.recipes.supervised.config import SupervisedConfig

    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["type"] == "object"
    named = {name for section in objects_of(schema) for name in section["properties"]}
    assert named == {field.name.rpartition(".")[2] for field in fields_of(SupervisedConfig)}
    assert {"gamma", "null_slots", "noise", "until_epoch", "channels", "patience"} <= named
    for section in objects_of(schema):
        assert section["additionalProperties"] is False


def test_every_field_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    bare = [
        f"{section['title']}.{name}"
        for section in objects_of(schema)
        for name, field in section["properties"].items()
        if not field.get("description") and "const" not in field
    ]
    assert bare == []


def test_module_and_script_are_the_same() -> None:
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="dist-moe")
    assert script.load() is cli.console_script
