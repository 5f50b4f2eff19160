"""Settings: flags over ``FATHOM_*`` variables over a YAML file.

    python -m server.config

prints the table of docs/settings.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    FilePath,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.types import PathType
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from server.levels import LevelSpec

ENV_PREFIX = "FATHOM_"
# Variables of the commands that talk to a server; ``serve`` does not read them.
CLIENT_VARIABLES = frozenset(
    {
        "FATHOM_ADDRESS",
        "FATHOM_CLIENT_CERTIFICATE",
        "FATHOM_CLIENT_KEY",
        "FATHOM_TLS",
        "FATHOM_TLS_CA",
        "FATHOM_TLS_SERVER_NAME",
        "FATHOM_TOKEN",
        "FATHOM_TOKEN_FILE",
    }
)

_LEVEL_ALLOWED = (
    "a number of layers (1 or more), a prune ratio (0.0 to less than 1, with a decimal point), "
    "or {depth: ..., prefill_depth: ...} of these"
)
_LEVELS_SYNTAX = (
    "NAME=DEPTH or NAME=PREFILL/DECODE, separated by commas, or a JSON object; a depth is "
    "a number of layers or, with a decimal point, a prune ratio"
)
_OF_QUANTIZE = ("quantize_group_size", "quantize_act_order", "order")
# Kubernetes sets these in every pod for a Service that is named fathom.
_SERVICE_LINK = re.compile(r"FATHOM_(SERVICE_(HOST|PORT(_.+)?)|PORT(_\d+_(TCP|UDP)(_.+)?)?)")
_SERVICE_LINK_HINT = (
    "Kubernetes sets it for a Service named fathom: use enableServiceLinks: false in the pod"
)


class ConfigError(Exception):
    """Settings that cannot be served; one line for each problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def _not_allowed(allowed: str) -> PydanticCustomError:
    return PydanticCustomError("not_allowed", "{allowed}", {"allowed": allowed})


def _depth_from(value: object) -> int | float:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                raise _not_allowed(_LEVEL_ALLOWED) from None
    is_depth = (isinstance(value, int) and not isinstance(value, bool) and value >= 1) or (
        isinstance(value, float) and 0 <= value < 1
    )
    if not is_depth:
        raise _not_allowed(_LEVEL_ALLOWED)
    return typing.cast("int | float", value)


def _level_from(value: object) -> LevelSpec:
    depth: object
    prefill_depth: object
    match value:
        case LevelSpec(depth=depth, prefill_depth=prefill_depth):
            pass
        case {"depth": depth, "prefill_depth": prefill_depth, **others} if not others:
            pass
        case {"depth": depth, **others} if not others:
            prefill_depth = None
        case str() if "/" in value:
            prefill_depth, depth = value.split("/", maxsplit=1)
        case _:
            depth, prefill_depth = value, None
    return LevelSpec(
        name="",  # the key of the mapping, which is not known here
        depth=_depth_from(depth),
        prefill_depth=None if prefill_depth is None else _depth_from(prefill_depth),
    )


def _levels_from(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _object_from(value)
    levels: dict[str, str] = {}
    for item in value.split(","):
        name, equals, depth = item.strip().partition("=")
        if not equals or name in levels:
            raise _not_allowed(_LEVELS_SYNTAX)
        levels[name] = depth
    return levels


def _shares_from(value: object) -> object:
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return _object_from(value)
    shares: dict[str, str] = {}
    for item in value.split(","):
        name, equals, share = item.strip().partition("=")
        if not equals or name in shares:
            raise _not_allowed("NAME=SHARE, separated by commas, or a JSON object")
        shares[name] = share
    return shares


def _object_from(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise _not_allowed("a JSON object") from None


def _number_from(value: object) -> object:
    try:
        return int(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _names_from(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _default_state_dir() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "fathom"


UserPath = Annotated[Path, AfterValidator(Path.expanduser)]
Port = Annotated[int, Ge(0), Le(65535)]
Level = Annotated[LevelSpec, BeforeValidator(_level_from)]


class Settings(BaseSettings):
    """What ``fathom serve`` runs with; :func:`load_settings` reads it."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    config: FilePath | None = Field(None, description="YAML file with any of the other settings.")
    model: str | None = Field(
        None, description="Checkpoint directory or Hugging Face Hub id; none: the demo model."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    trust_remote_code: bool = Field(
        False, description="Whether code that comes with the model may run."
    )
    host: str = Field("127.0.0.1", description="Address that gRPC listens on.", min_length=1)
    port: Port = Field(50051, description="Port of gRPC; 0: any free one.")
    tls_certificate: FilePath | None = Field(
        None,
        description="Certificate of the server in PEM, with those between it and its authority; "
        "none: plain text.",
    )
    tls_key: FilePath | None = Field(None, description="Key of that certificate, in PEM.")
    tls_client_ca: FilePath | None = Field(
        None,
        description="Authorities in PEM, one of which must have signed every client's "
        "certificate; none: clients need none.",
    )
    clients: FilePath | None = Field(
        None, description="File of the clients that may call; none: whoever can connect."
    )
    allow_plaintext: bool = Field(
        False, description="Whether to listen beyond this machine without TLS."
    )
    allow_anonymous: bool = Field(
        False, description="Whether to listen beyond this machine without knowing the clients."
    )
    metrics_host: str = Field(
        "127.0.0.1", description="Address that the metrics listen on.", min_length=1
    )
    metrics_port: Port = Field(9090, description="Port of the metrics; 0: any free one.")
    state_dir: UserPath = Field(
        default_factory=_default_state_dir,
        description="Directory that keeps plans and measurements between starts; several servers "
        "may share it.",
        json_schema_extra={"default_text": "`$XDG_CACHE_HOME/fathom`, else `~/.cache/fathom`"},
    )
    calibration: str | None = Field(
        None,
        description="Text to rank the layers on: a file, a directory, JSON lines or a Hugging "
        "Face dataset; none: the documentation of Python's standard library.",
    )
    calibration_tokens: Annotated[int, Ge(64)] = Field(
        32768, description="Tokens of it to rank the layers on."
    )
    plan: FilePath | None = Field(
        None,
        description="Plan file to use in place of a calibration; one that was made for another "
        "model is refused.",
    )
    quality_text: str | None = Field(
        None,
        description="Text to measure quality on, as for `calibration`; none: a part of the "
        "standard library's documentation that neither calibration nor the demo model has seen.",
    )
    quality_tokens: Annotated[int, Ge(64)] = Field(
        8192, description="Tokens of it to measure quality on."
    )
    quality_depths: Literal["all", "levels"] | None = Field(
        None,
        description="Whether quality is measured at every depth or at the levels alone; none: "
        "every depth of models of up to 16 layers.",
    )
    levels: Annotated[dict[str, Level], NoDecode, BeforeValidator(_levels_from)] = Field(
        {},
        description="Operating points by name: a number of layers (12), a prune ratio (0.25), or "
        "`{depth: 16, prefill_depth: 12}`; as a flag or a variable also `NAME=DEPTH` or "
        "`NAME=PREFILL/DECODE`, separated by commas. None: the default levels.",
        json_schema_extra={"default_text": "default levels"},
    )
    default_level: str | None = Field(
        None, description="Level of requests that name no depth; none: the first one."
    )
    auto_levels: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names_from)] = Field(
        (),
        description="Levels of requests that leave the depth to the server: the first without "
        "load, each further one under more. None: the default level and all shallower ones.",
    )
    auto_by_default: bool = Field(
        False, description="Whether requests that name no depth leave it to the server."
    )
    auto_first_token_seconds: Annotated[float, Gt(0)] = Field(
        1.0, description="Time to the first token above which such requests get a shallower level."
    )
    auto_inter_token_seconds: Annotated[float, Gt(0)] = Field(
        0.1, description="Time between two tokens above which they do."
    )
    auto_hold_seconds: Annotated[float, Ge(0)] = Field(
        30.0, description="Seconds of low load after which they get the next deeper level again."
    )
    auto_max_quality_loss: Annotated[float, Ge(0)] = Field(
        0.25,
        description="Largest perplexity ratio to dense, less 1, of a level that load may lead to.",
    )
    auto_min_agreement: Annotated[float, Ge(0), Le(1)] = Field(
        0.0, description="Smallest share of next tokens it has in common with dense."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type of weights and activations; auto: the checkpoint's, but float32 on "
        "processors that are slow in bfloat16.",
    )
    engine: Literal["elastic", "dedicated"] = Field(
        "elastic",
        description="What runs the model: one engine for every depth, or for each level an "
        "unmodified vLLM engine of its own.",
    )
    memory_shares: Annotated[
        dict[str, Annotated[float, Gt(0), Le(1)]], NoDecode, BeforeValidator(_shares_from)
    ] = Field(
        {},
        description="Parts of the memory that the dedicated engines get, by level, at most 1 "
        "together: of `kv_cache_gib` on CPU, of vLLM's `gpu_memory_utilization` on GPU; as a flag "
        "or a variable also `NAME=SHARE`, separated by commas. Levels that are not named have "
        "equal parts of the rest.",
    )
    compile_layers: bool | None = Field(
        None,
        description="Whether the elastic engine compiles its layers, once for all of them; none: "
        "on CPU, where there is a C++ compiler.",
    )
    quantize: Literal["gptq-4bit", "gptq-8bit"] | None = Field(
        None,
        description="Whether the model is quantized before it is served; it is kept in "
        "`state_dir`. vLLM runs 8 bits on GPUs alone.",
    )
    quantize_group_size: (
        Annotated[Literal[-1, 32, 64, 128], BeforeValidator(_number_from)] | None
    ) = Field(
        None,
        description="Weights of a row that share a scale, -1: all of them; none: the largest of "
        "32, 64 and 128 that fits the model.",
    )
    quantize_act_order: bool = Field(
        False, description="Whether the columns with the largest activations are quantized first."
    )
    order: Literal["quantize-then-prune", "prune-then-quantize"] = Field(
        "quantize-then-prune",
        description="What comes first; `prune-then-quantize` makes another model of each depth, "
        "which `fathom export` can write.",
    )
    max_context: Annotated[int, Ge(2)] | None = Field(
        None, description="Longest prompt and generation together, in tokens; none: the model's."
    )
    max_num_seqs: Annotated[int, Ge(1), Le(65536)] = Field(
        256, description="Requests that run in one batch at most."
    )
    max_waiting: Annotated[int, Ge(1)] = Field(
        1024, description="Requests that wait at most; more are refused with RESOURCE_EXHAUSTED."
    )
    max_waiting_tokens: Annotated[int, Ge(1)] = Field(
        2**20,
        description="Prompt tokens of the requests that wait at most; more are refused with "
        "RESOURCE_EXHAUSTED.",
    )
    max_unread: Annotated[int, Ge(1)] = Field(
        2**18,
        description="Tokens and log-probabilities of a stream that its client may leave unread; "
        "with more it ends with RESOURCE_EXHAUSTED.",
    )
    max_message_bytes: Annotated[int, Ge(1024), Le(2**31 - 1)] = Field(
        16 * 2**20, description="Largest gRPC message that is accepted."
    )
    max_streams_per_connection: Annotated[int, Ge(1), Le(2**31 - 1)] = Field(
        1024, description="Calls that run on one connection at most; others wait in the client."
    )
    max_connection_seconds: Annotated[float, Ge(1)] | None = Field(
        None,
        description="Age at which clients are asked to connect anew, so that they spread over "
        "servers; calls that run are finished. None: no limit.",
    )
    grace_seconds: Annotated[float, Ge(0)] = Field(
        30.0, description="Seconds that running requests get to finish when the server is stopped."
    )
    engine_timeout_seconds: Annotated[float, Ge(0)] = Field(
        120.0,
        description="Seconds without an answer after which the engine is killed and started "
        "again; longer than any step takes. An engine that does nothing at all is noticed "
        "within 10 s. 0: never.",
    )
    kv_cache_gib: Annotated[float, Gt(0)] | None = Field(
        None,
        description="Memory for the KV cache on CPU, in GiB; none: a quarter of what is "
        "available, at most 4.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines that are written."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Whether log lines are text for people or JSON objects."
    )
    otlp_endpoint: Annotated[str, StringConstraints(pattern=r"^https?://.+")] | None = Field(
        None,
        description="Where traces go, over OTLP and gRPC, as `http://127.0.0.1:4317`; none: where "
        "the variables of OpenTelemetry say, if anywhere.",
    )
    engine_args: Annotated[dict[str, Any], NoDecode, BeforeValidator(_object_from)] = Field(
        {},
        description="More arguments of vLLM's `AsyncEngineArgs` by name; as a flag or a variable "
        "a JSON object.",
    )

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

    @field_validator("levels")
    @classmethod
    def _name_levels(cls, levels: dict[str, LevelSpec]) -> dict[str, LevelSpec]:
        return {name: dataclasses.replace(spec, name=name) for name, spec in levels.items()}

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if self.port and (self.host, self.port) == (self.metrics_host, self.metrics_port):
            raise PydanticCustomError(
                "together",
                "metrics_port: got {port}, allowed: another port than 'port' has",
                {"port": self.metrics_port},
            )
        for name, other in (
            ("tls_certificate", "tls_key"),
            ("tls_key", "tls_certificate"),
            ("tls_client_ca", "tls_certificate"),
        ):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise PydanticCustomError(
                    "together",
                    "{name}: got {path}, allowed: none without {other}",
                    {"name": name, "path": repr(str(getattr(self, name))), "other": other},
                )
        if self.levels and self.default_level and self.default_level not in self.levels:
            raise PydanticCustomError(
                "together",
                "default_level: got {level}, allowed: one of the levels: {levels}",
                {"level": repr(self.default_level), "levels": ", ".join(self.levels)},
            )
        if self.quantize is None:
            for name in _OF_QUANTIZE:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise PydanticCustomError(
                        "together",
                        "{name}: got {value}, allowed: nothing unless 'quantize' is set",
                        {"name": name, "value": repr(getattr(self, name))},
                    )
        if (total := sum(self.memory_shares.values())) > 1 + 1e-9:
            raise PydanticCustomError(
                "together",
                "memory_shares: got {total} in all, allowed: at most 1",
                {"total": f"{total:g}"},
            )
        if self.memory_shares and self.engine != "dedicated":
            raise PydanticCustomError(
                "together",
                "memory_shares: got {names}, allowed: none with the engine '{engine}', which has "
                "one memory for all levels",
                {"names": ", ".join(self.memory_shares), "engine": self.engine},
            )
        return self


def load_settings(flags: Mapping[str, object]) -> Settings:
    """Return the settings of ``flags`` (those that are not None), environment and YAML file.

    Raises:
        ConfigError: a setting is unknown or has a value that is not allowed.
    """
    problems = list(_unknown_variables(os.environ))
    given = {name: value for name, value in flags.items() if value is not None}
    settings: Settings | None = None
    try:
        settings = Settings(**given)  # type: ignore[arg-type]  # checked by pydantic
    except ValidationError as error:
        problems += [_problem(details) for details in error.errors()]
    except yaml.YAMLError as error:
        problems.append(f"config: no valid YAML: {' '.join(str(error).split())}")
    except (TypeError, ValueError) as error:  # a file whose top is no mapping
        problems.append(f"config: got a file that is no mapping of settings to values: {error}")
    if settings is None or problems:
        raise ConfigError(problems)
    return settings


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | CLIENT_VARIABLES
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known:
            hint = _SERVICE_LINK_HINT if _SERVICE_LINK.fullmatch(name) else _nearest(name, known)
            yield f"unknown variable {name}; {hint}"


def _nearest(name: str, known: set[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if matches:
        return f"did you mean {matches[0]}?"
    return f"the known ones are {', '.join(sorted(known))}"


def _problem(details: ErrorDetails) -> str:
    """Return one line that names setting, value and what is allowed."""
    if details["type"] == "together":
        return details["msg"]
    location = [str(part) for part in details["loc"] if part != "function-before"]
    setting = location[0]
    if details["type"] == "extra_forbidden":
        return f"unknown setting {setting!r}; {_nearest(setting, set(Settings.model_fields))}"
    value = details["input"]
    shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
    if details["type"] == "not_allowed":
        allowed = details["msg"]
    else:
        allowed = allowed_values(Settings.model_fields[setting])
    if setting == "port" and isinstance(value, str) and value.startswith("tcp://"):
        allowed += f" ({_SERVICE_LINK_HINT})"
    return f"{'.'.join(location)}: got {shown}, allowed: {allowed}"


def allowed_values(field: FieldInfo) -> str:
    """Say in words what values the field takes."""
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: object, metadata: list[Any]) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], [*metadata, *arguments[1:]])
    if origin is Literal:
        return ", ".join(str(value) for value in arguments)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _allowed(inner, metadata)
    if annotation is bool:
        return "true, false"
    if annotation in (int, float):
        return _bounds(metadata)
    if any(isinstance(item, PathType) for item in metadata):
        return "an existing file"
    if annotation is Path:
        return "a path"
    if origin is dict:
        return "names with values"
    if any(isinstance(item, StringConstraints) and item.pattern for item in metadata):
        return "a URL with http:// or https://"
    if origin is tuple:
        return "names, separated by commas"
    return "text, not empty" if any(isinstance(item, MinLen) for item in metadata) else "text"


def _bounds(metadata: list[Any]) -> str:
    low = next((item.ge for item in metadata if isinstance(item, Ge)), None)
    above = next((item.gt for item in metadata if isinstance(item, Gt)), None)
    high = next((item.le for item in metadata if isinstance(item, Le)), math.inf)
    if above is not None:
        return f"more than {above}"
    return f"{low} or more" if high == math.inf else f"{low} to {high}"


def settings_table() -> str:
    """Return the table of settings, in Markdown."""
    lines = ["| Setting | Default | Allowed | Meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        lines.append(
            f"| `{name}` | {_default_text(field)} | {allowed_values(field)} | {field.description} |"
        )
    return "\n".join(lines)


def _default_text(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "default_text" in extra:
        return str(extra["default_text"])
    match field.default:
        case None | {} | ():
            return "none"
        case bool():
            return f"`{str(field.default).lower()}`"
        case _:
            return f"`{field.default}`"


if __name__ == "__main__":
    print(settings_table())
