"""Gates by name in a configuration: which there are, what is refused and how it is told."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from dist_moe.config.settings import Settings
from dist_moe.gates import (
    GATES,
    CometConfig,
    Gate,
    GateConfig,
    GateContext,
    GateSettings,
    Softmax,
    TopKConfig,
)

NAMES = {"ada_moe", "comet", "dselect_k", "hash", "relu", "smoe_dropout", "softmax", "top_k"}
CONTEXT = GateContext(id_counts=torch.ones(9), total_steps=10)


class Model(Settings):
    gate: GateConfig = Field(default_factory=lambda: CometConfig(), description="the gate")


class Run(Settings):
    model: Model = Field(default_factory=lambda: Model(), description="the model")


def faults(gate: Any) -> list[ErrorDetails]:
    with pytest.raises(ValidationError) as caught:
        Run.model_validate({"model": {"gate": gate}})
    return caught.value.errors()


def test_the_gates_of_the_package() -> None:
    assert {name for name, one in GATES.by_name.items() if one.__module__.startswith("dist_moe.")} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_gate_builds_and_routes_from_its_name_alone_and_survives_a_round_trip(name: str) -> None:
    run = Run.model_validate({"model": {"gate": name}})
    assert run == Run.model_validate({"model": {"gate": {"name": name}}})
    assert Run.model_validate(run.model_dump(mode="json")) == run
    assert run.model_dump(mode="json")["model"]["gate"]["name"] == name
    assert list(run.model.gate.validation_errors(4)) == []
    gate = run.model.gate.build(3, 4, CONTEXT)
    assert (gate.dim, gate.num_experts) == (3, 4)
    assert gate(torch.randn(5, 3), torch.arange(5)).num_tokens == 5


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_field_but_the_name_is_described(name: str) -> None:
    fields = GATES.by_name[name].model_fields
    assert [field for field, info in fields.items() if field != "name" and not info.description] == []


@pytest.mark.parametrize("gate", [{"name": "commet"}, "commet"])
def test_unknown_name_is_told_with_the_known_ones(gate: Any) -> None:
    (fault,) = faults(gate)
    assert fault["loc"] == ("model", "gate")
    assert f"name='commet' is not a gate; did you mean comet? allowed: {', '.join(sorted(NAMES))}" in fault["msg"]


@pytest.mark.parametrize("fields", [{}, {"k": 3}])
def test_a_gate_without_a_name_is_comet(fields: dict[str, Any]) -> None:
    run = Run.model_validate({"model": {"gate": fields}})
    assert run.model.gate == CometConfig(**fields)


@pytest.mark.parametrize("gate", [7, None, {"name": ["comet"]}])
def test_what_names_no_gate_is_refused(gate: Any) -> None:
    (fault,) = faults(gate)
    assert "is not a gate" in fault["msg"] or fault["type"] == "dict_type"


@pytest.mark.parametrize(
    ("gate", "field"),
    [
        ({"name": "comet", "gamma": -1}, "gamma"),
        ({"name": "top_k", "gamma": 1}, "gamma"),
        ({"name": "top_k", "scores": "linear"}, "scores"),
        ({"name": "smoe_dropout", "k_min": 0}, "k_min"),
    ],
)
def test_fault_in_a_field_is_located_there(gate: dict[str, Any], field: str) -> None:
    (fault,) = faults(gate)
    assert fault["loc"] == ("model", "gate", field)


def test_json_schema_contains_every_gate_with_its_fields() -> None:
    schema = Run.model_json_schema()
    choices = schema["$defs"]["Model"]["properties"]["gate"]["oneOf"]
    sections = [schema["$defs"][c["$ref"].removeprefix("#/$defs/")] if "$ref" in c else c for c in choices]
    by_name = {section["properties"]["name"]["const"]: section for section in sections}
    assert set(by_name) == NAMES
    for name, settings in GATES.by_name.items():
        assert set(by_name[name]["properties"]) == set(settings.model_fields)


class AnotherTopKConfig(GateSettings):
    name: Literal["top_k"] = "top_k"

    def build(self, dim: int, num_experts: int, context: GateContext) -> Gate:
        return Softmax(dim, num_experts)


class NamelessConfig(AnotherTopKConfig):
    name: str  # type: ignore[assignment]


class EvenConfig(AnotherTopKConfig):
    name: Literal["even"] = "even"  # type: ignore[assignment]


def test_a_taken_name_is_refused_and_stays_with_its_owner() -> None:
    with pytest.raises(ValueError, match=r"the gate name 'top_k' is taken by dist_moe\.gates\.top_k\.TopKConfig"):
        GATES.register(AnotherTopKConfig)
    assert GATES.by_name["top_k"] is TopKConfig


def test_registering_the_same_settings_again_is_no_fault() -> None:
    assert GATES.register(TopKConfig) is TopKConfig


def test_settings_without_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match="NamelessConfig must declare its name"):
        GATES.register(NamelessConfig)


def test_a_gate_of_ones_own_becomes_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GATES, "_entries", GATES.by_name)
    GATES.register(EvenConfig)
    gate = Run.model_validate({"model": {"gate": "even"}}).model.gate
    assert isinstance(gate, EvenConfig)
    assert isinstance(gate.build(3, 4, CONTEXT), Softmax)
