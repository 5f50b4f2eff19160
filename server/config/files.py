"""Settings of files: the settings file and the state directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, FilePath

UserPath = Annotated[Path, AfterValidator(Path.expanduser)]


def _default_state_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fathom"


class FileSettings(BaseModel):
    config: FilePath | None = Field(None, description="YAML file with any of the other settings.")
    state_dir: UserPath = Field(
        default_factory=_default_state_dir,
        description="Directory that keeps plans and measurements between starts; several servers "
        "may share it.",
        json_schema_extra={"default_text": "`$XDG_CACHE_HOME/fathom`, else `~/.cache/fathom`"},
    )
