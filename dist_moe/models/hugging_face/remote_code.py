"""The modules that go along with models of our own architectures: transformers runs them, and they find dist_moe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_moe.errors import UserError
from dist_moe.models.hugging_face.fields import IMPORTS

_SOURCE = '''"""{about} of the package comet-dist-moe."""

try:
    from dist_moe.models.hugging_face.{module} import (
        {classes},
    )
except ImportError as error:
    raise ImportError(
        "this model needs the package comet-dist-moe, whose import name is dist_moe (and not PyPI's dist-moe): "
        f"{{error}}"
    ) from error

__all__ = {names}
'''


@dataclass(frozen=True)
class RemoteCode:
    """``module``: where the classes are, beside this file. ``classes``: ours, by transformers' Auto classes."""

    module: str
    about: str
    classes: dict[str, str]

    def fields(self, imports: Sequence[str]) -> dict[str, Any]:
        """Of config.json."""
        return {
            "auto_map": {auto: f"{self.module}.{name}" for auto, name in self.classes.items()},
            IMPORTS: list(imports),
        }

    def write(self, directory: Path) -> None:
        """Raises UserError if it cannot be written."""
        names = sorted(self.classes.values())
        source = _SOURCE.format(about=self.about, module=self.module, classes=",\n        ".join(names), names=names)
        path = directory / f"{self.module}.py"
        try:
            path.write_text(source, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}") from error


DECODER = RemoteCode(
    "modeling_dist_moe",
    "A decoder whose feed-forward layers are mixtures of experts",
    {"AutoConfig": "DistMoEConfig", "AutoModelForCausalLM": "DistMoEForCausalLM"},
)
BERT = RemoteCode(
    "modeling_dist_moe_bert",
    "A BERT whose feed-forward blocks are mixtures of experts",
    {
        "AutoConfig": "DistMoEBertConfig",
        "AutoModel": "DistMoEBertModel",
        "AutoModelForSequenceClassification": "DistMoEBertForSequenceClassification",
        "AutoModelForQuestionAnswering": "DistMoEBertForQuestionAnswering",
    },
)
