"""The reason why an engine could not start reaches the server."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from server.engine.arguments import EngineConfig, refusal
from server.engine.start_failure import (
    EngineStartError,
    named_failures,
    reason_of,
    report_start_failures,
)

HINT = "Engine core initialization failed. See root cause above. Failed core proc(s): {}"


@pytest.fixture(autouse=True)
def no_handlers_are_left() -> Iterator[None]:
    logger = logging.getLogger("vllm")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before


def fail(*errors: Exception) -> None:
    """Log exceptions as a process of vLLM does."""
    report_start_failures()
    for error in errors:
        try:
            raise error
        except Exception:
            logging.getLogger("vllm.v1.engine.core").exception("EngineCore failed to start.")


def start(logged: tuple[Exception, ...], raised: Exception) -> None:
    """Start a process that fails like this, and raise the error that its parent gets."""
    with named_failures():
        process = multiprocessing.get_context("fork").Process(target=fail, args=logged)
        process.start()
        process.join()
        raise raised


def test_the_first_reason_of_another_process_is_told() -> None:
    logged = (ValueError("bits: no kernel\nfor 3"), RuntimeError(HINT), ValueError("later"))
    with pytest.raises(EngineStartError, match=r"^bits: no kernel for 3$"):
        start(logged, RuntimeError(HINT))


def test_an_exception_that_says_more_stays() -> None:
    with pytest.raises(ValueError, match=r"^no such dtype$"):
        start((KeyError("x"),), ValueError("no such dtype"))
    with pytest.raises(RuntimeError, match="See root cause above"):
        start((), RuntimeError(HINT))


def test_what_is_logged_after_the_start_goes_nowhere() -> None:
    with named_failures():
        report_start_failures()
    fail(ValueError("later"))


def chained(outer: Exception, inner: Exception) -> Exception:
    try:
        raise outer from inner
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("a\n b"), "a b"),
        (KeyError("layers"), "KeyError: 'layers'"),
        (AssertionError(), "AssertionError"),
        (chained(RuntimeError(HINT), ValueError("cause")), "cause"),
        (chained(AssertionError(), KeyError("cause")), "KeyError: 'cause'"),
        (ValueError("x" * 10_000), "x" * 600),
    ],
)
def test_reasons_are_one_line(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def validation_error(message: str) -> ValidationError:
    class Model(BaseModel):
        value: int

        @field_validator("value")
        @classmethod
        def check(cls, value: int) -> int:
            raise ValueError(message)

    with pytest.raises(ValidationError) as caught:
        Model(value=1)
    return caught.value


@pytest.mark.parametrize(
    ("error", "engine_args", "said"),
    [
        (
            validation_error("Sliding window for some layers. See the docs."),
            {},
            "model: got 'm', allowed: what vLLM takes: Sliding window for some layers. See the",
        ),
        (
            validation_error("User-specified max_model_len (9) is greater. Else."),
            {},
            "max_context: got None, allowed: what vLLM takes: User-specified max_model_len (9) is",
        ),
        (
            validation_error("block_size must be a power of two"),
            {"seed": 1234, "block_size": 7},
            "engine_args.block_size: got 7, allowed: what vLLM takes: block_size must be",
        ),
        (
            ValueError("Unknown quantization method: nope"),
            {"quantization": "nope"},
            "engine_args.quantization: got 'nope', allowed: what vLLM takes: Unknown",
        ),
        (KeyError("rope_type"), {}, "model: got 'm', allowed: what vLLM takes: KeyError: 'rope_t"),
    ],
)
def test_what_vllm_refuses_has_a_name(
    error: Exception, engine_args: dict[str, object], said: str
) -> None:
    config = EngineConfig(Path("m"), "m", engine_args=engine_args)
    assert str(refusal(error, config)).startswith(said)
