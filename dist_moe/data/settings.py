"""The base of the configuration of every data set."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from dist_moe.config.settings import Settings
from dist_moe.data.fetch.files import CACHE_ENV


class DataSettings(Settings):
    """Which data set, and where its files are; a subclass narrows ``name`` to a Literal of one name or several."""

    name: str
    root: Path | None = Field(default=None, description="Directory of the original files.")
    cache: Path | None = Field(
        default=None,
        description="Directory where downloads and prepared arrays are kept. If not given, the environment "
        f"variable {CACHE_ENV}, or else ~/.cache/dist_moe.",
    )

    def fetch(self, progress: bool) -> str:
        """Prepare the data set, reporting on stderr if ``progress``, and return what there is of it, for a person.

        Raises `UserError` for anything that the user can fix.
        """
        raise NotImplementedError
