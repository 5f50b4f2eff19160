"""Settings that are refused."""

from __future__ import annotations

from pydantic_core import PydanticCustomError

NOT_ALLOWED = "not_allowed"
CONFLICT = "conflict"


class ConfigError(Exception):
    """Settings that cannot be served; one line for each problem."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


def not_allowed(allowed: str) -> PydanticCustomError:
    """Return what a validator of one setting raises; ``allowed`` says what it takes."""
    return PydanticCustomError(NOT_ALLOWED, "{allowed}", {"allowed": allowed})


def conflict(setting: str, given: str, allowed: str) -> PydanticCustomError:
    """Return what a validator of several settings raises, about one of them."""
    problem = f"{setting}: got {given}, allowed: {allowed}"
    return PydanticCustomError(CONFLICT, "{problem}", {"problem": problem})
