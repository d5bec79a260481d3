"""Language modelling: which token comes next?"""

from typing import ClassVar

from dist_moe.data.text import TextConfig, prepare_text
from dist_moe.tasks.language.task import LanguageModelTask
from dist_moe.tasks.settings import TaskSettings


class LanguageModelSettings(TextConfig, TaskSettings):
    """A corpus of domains, or the user's own directory, with the next token as target."""

    kind: ClassVar[str] = "language"
    target_names: ClassVar[tuple[str, ...]] = ("next_token",)

    def open(self, *, progress: bool) -> LanguageModelTask:
        """Prepare the text and return the task."""
        return LanguageModelTask(prepare_text(self, progress=progress))


__all__ = ["LanguageModelSettings", "LanguageModelTask"]
