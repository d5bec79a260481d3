"""The base of every section of the configuration: immutable, no unknown fields, no inf or nan."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A section of the configuration, declared beside the class that it configures."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
