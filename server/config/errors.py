"""Errors of settings."""

from __future__ import annotations

from pydantic_core import PydanticCustomError

NOT_ALLOWED = "not_allowed"
CONFLICT = "conflict"


class ConfigError(Exception):
    """Settings are wrong; there is one line for each problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def not_allowed(allowed: str) -> PydanticCustomError:
    """Return the error of a value that a setting does not take; ``allowed`` says what it takes."""
    return PydanticCustomError(NOT_ALLOWED, "{allowed}", {"allowed": allowed})


def conflict(setting: str, given: str, allowed: str) -> PydanticCustomError:
    """Return the error of a value that does not fit those of other settings."""
    problem = f"{setting}: got {given}, allowed: {allowed}"
    return PydanticCustomError(CONFLICT, "{problem}", {"problem": problem})
