"""All settings together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ModelWrapValidatorHandler, PrivateAttr, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from server.config.depth import DepthSettings
from server.config.engine import EngineSettings
from server.config.errors import conflict
from server.config.files import FileSettings
from server.config.listening import ListeningSettings
from server.config.logs import LogSettings
from server.config.model import ModelSettings
from server.config.old_names import rename_old
from server.config.requests import RequestSettings

ENV_PREFIX = "FATHOM_"

# The areas of settings by the headings of docs/settings.md, in its order.
AREAS: dict[str, type[BaseModel]] = {
    "Files": FileSettings,
    "Model": ModelSettings,
    "Depths": DepthSettings,
    "Engine": EngineSettings,
    "Listening": ListeningSettings,
    "Requests": RequestSettings,
    "Logs and traces": LogSettings,
}


# The fields of the last base class come first.
class Settings(
    LogSettings,
    RequestSettings,
    ListeningSettings,
    EngineSettings,
    DepthSettings,
    ModelSettings,
    FileSettings,
    BaseSettings,
):
    """All settings of a server; :func:`load_settings` reads them."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    _old_names: frozenset[str] = PrivateAttr(frozenset())

    @property
    def old_names(self) -> frozenset[str]:
        """The old names under which settings were given."""
        return self._old_names

    @model_validator(mode="wrap")
    @classmethod
    def _rename_old(cls, values: Any, handler: ModelWrapValidatorHandler[Settings]) -> Settings:
        """Accept old names; those that flags and variables have, :func:`load_settings` replaces."""
        used = rename_old(values)
        settings = handler(values)
        settings._old_names = frozenset(used)
        return settings

    @model_validator(mode="after")
    def _check_repair(self) -> Settings:
        if self.repair not in ("auto", "none") and self.engine != "elastic":
            allowed = (
                f"auto or none with the engine '{self.engine}', which serves layers that are cut "
                "out"
            )
            raise conflict("repair", repr(self.repair), allowed)
        if self.heal and self.repair != "healed":
            raise conflict("heal", repr(self.heal), "false unless 'repair' is healed")
        if self.heal and self.quantize is not None:
            allowed = "false with 'quantize': quantized weights pass no gradients on"
            raise conflict("heal", repr(self.heal), allowed)
        size = self.heal_intermediate_size
        if size is not None and self.heal_kind != "gated-mlp":
            allowed = "none unless 'heal_kind' is gated-mlp: maps have no intermediate size"
            raise conflict("heal_intermediate_size", repr(size), allowed)
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        config = init_settings().get("config") or env_settings().get("config")
        if config is None or not Path(config).is_file():  # the field says what is wrong with it
            return init_settings, env_settings
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, Path(config))
