"""Settings read from flags, variables and a file."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from server.config.allowed import allowed_values
from server.config.errors import CONFLICT, NOT_ALLOWED, ConfigError
from server.config.old_names import OLD_NAMES, rename_old
from server.config.settings import ENV_PREFIX, Settings

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
# Others that are no settings: the elastic engine reads it, to try versions that nobody has tested.
OTHER_VARIABLES = frozenset({"FATHOM_UNTESTED_VLLM"})
# Kubernetes sets these in every pod for a Service that is named fathom.
_SERVICE_LINK = re.compile(r"FATHOM_(SERVICE_(HOST|PORT(_.+)?)|PORT(_\d+_(TCP|UDP)(_.+)?)?)")
_SERVICE_LINK_HINT = (
    "Kubernetes sets it for a Service named fathom: use enableServiceLinks: false in the pod"
)


def load_settings(flags: Mapping[str, object]) -> Settings:
    """Return the settings of ``flags`` (those that are not None), environment and YAML file.

    Raises:
        ConfigError: a setting is unknown or has a value that is not allowed.
    """
    problems = list(_unknown_variables(os.environ))
    given = {name: value for name, value in flags.items() if value is not None}
    old_names = rename_old(given) | _old_variables(given)
    settings: Settings | None = None
    try:
        settings = Settings(**given)  # type: ignore[arg-type]  # checked by pydantic
        settings._old_names |= old_names
    except ValidationError as error:
        problems += [_problem(details) for details in error.errors()]
    except yaml.YAMLError as error:
        problems.append(f"config: no valid YAML: {' '.join(str(error).split())}")
    except (TypeError, ValueError) as error:  # the file is a list or a single value
        problems.append(f"config: got a file that is no mapping of settings to values: {error}")
    if settings is None or problems:
        raise ConfigError(problems)
    return settings


def _old_variables(given: dict[str, object]) -> set[str]:
    """Add the values of variables with old names to the flags; return these names.

    Flags and variables with the present names come first.
    """
    used = {old for old in OLD_NAMES if os.environ.get(_variable(old))}
    for old in used:
        if not os.environ.get(_variable(OLD_NAMES[old])):
            given.setdefault(OLD_NAMES[old], os.environ[_variable(old)])
    return used


def _variable(setting: str) -> str:
    return f"{ENV_PREFIX}{setting.upper()}"


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    known = {_variable(name) for name in Settings.model_fields} | CLIENT_VARIABLES
    old = {_variable(name) for name in OLD_NAMES}
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known | old | OTHER_VARIABLES:
            hint = _SERVICE_LINK_HINT if _SERVICE_LINK.fullmatch(name) else _nearest(name, known)
            yield f"unknown variable {name}; {hint}"


def _nearest(name: str, known: set[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if matches:
        return f"did you mean {matches[0]}?"
    return f"the known ones are {', '.join(sorted(known))}"


def _problem(details: ErrorDetails) -> str:
    """Return one line that names the setting, its value and what is allowed."""
    if details["type"] == CONFLICT:
        return details["msg"]
    location = [str(part) for part in details["loc"] if part != "function-before"]
    setting = location[0]
    if details["type"] == "extra_forbidden":
        return f"unknown setting {setting!r}; {_nearest(setting, set(Settings.model_fields))}"
    value = details["input"]
    shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
    if details["type"] == NOT_ALLOWED:
        allowed = details["msg"]
    else:
        allowed = allowed_values(Settings.model_fields[setting])
    if setting == "port" and isinstance(value, str) and value.startswith("tcp://"):
        allowed += f" ({_SERVICE_LINK_HINT})"
    return f"{'.'.join(location)}: got {shown}, allowed: {allowed}"
