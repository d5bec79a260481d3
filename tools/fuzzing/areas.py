"""All areas by name."""

from __future__ import annotations

from tools.fuzzing.case import Area
from tools.fuzzing.data import DataArea
from tools.fuzzing.environment import EnvironmentArea
from tools.fuzzing.hugging_face import HuggingFaceArea
from tools.fuzzing.runs import CheckpointsArea, RecordsArea
from tools.fuzzing.settings import FieldsArea, OverridesArea, YamlArea

_ALL: tuple[type[Area], ...] = (
    DataArea,
    HuggingFaceArea,
    YamlArea,
    OverridesArea,
    FieldsArea,
    EnvironmentArea,
    CheckpointsArea,
    RecordsArea,
)
AREAS: dict[str, type[Area]] = {area.name: area for area in _ALL}
