"""Log lines as text and as JSON."""

from __future__ import annotations

import json
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.telemetry.log_format import JsonLines, TextLines, with_fields

VALUES = st.one_of(st.text(), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
FIELDS = st.dictionaries(st.from_regex(r"[a-z_]{1,20}", fullmatch=True), VALUES)


def record(message: str, **fields: object) -> logging.LogRecord:
    logger = logging.getLogger("server.test")
    return logger.makeRecord(
        logger.name, logging.INFO, "", 0, message, (), None, extra=with_fields(fields)
    )


def test_text() -> None:
    line = TextLines("%(levelname)s %(message)s").format(
        record("request", code="OK", total=0.25, tokens=3, id='a "b', empty="", new="x\ny")
    )
    assert line == (r'INFO request code=OK total=0.25 tokens=3 id="a \"b" empty="" new="x\ny"')


def test_text_without_fields() -> None:
    assert TextLines("%(message)s").format(record("message with %")) == "message with %"


@given(value=st.text())
def test_no_value_looks_like_another_field(value: str) -> None:
    line = TextLines("%(message)s").format(record("m", one=value, two="2"))
    assert len(line.splitlines()) == 1
    rest = line.removeprefix("m one=")
    if rest.startswith('"'):
        found, end = json.JSONDecoder().raw_decode(rest)
    else:
        found, end = rest.partition(" ")[0], rest.index(" ")
    assert (found, rest[end:]) == (value, " two=2")


@given(message=st.text(), fields=FIELDS)
def test_json(message: str, fields: dict[str, object]) -> None:
    line = JsonLines().format(record(message.replace("%", ""), **fields))
    assert len(line.splitlines()) == 1
    found = json.loads(line)
    assert found["message"] == message.replace("%", "")
    assert (found["level"], found["logger"]) == ("INFO", "server.test")
    reserved = {"message", "level", "logger", "timestamp"}
    assert {name: found[name] for name in fields if name not in reserved} == {
        name: value for name, value in fields.items() if name not in reserved
    }


def test_json_of_an_error() -> None:
    try:
        raise ValueError("line\nbreak")
    except ValueError:
        logger = logging.getLogger("server.test")
        failed = logger.makeRecord(logger.name, logging.ERROR, "", 0, "failed", (), sys.exc_info())
    line = JsonLines().format(failed)
    assert len(line.splitlines()) == 1
    assert json.loads(line)["exc_info"].endswith("ValueError: line\nbreak")


@pytest.mark.parametrize("value", [None, object(), b"bytes", {1, 2}])
def test_json_of_anything(value: object) -> None:
    assert json.loads(JsonLines().format(record("m", value=value)))["message"] == "m"
