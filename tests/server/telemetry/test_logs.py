"""What a process with the server's log writes, from whatever part of it."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import logging, os, subprocess, sys, threading, warnings
from server.telemetry.log_format import with_fields
from server.telemetry.logs import Logs

logs = Logs("info", sys.argv[1])
logger = logging.getLogger("server.test")
logger.info("from the log", extra=with_fields({"tokens": 3}))
logger.debug("not wanted")
logs.set_level("debug")
logger.debug("wanted")
logging.getLogger("elsewhere").info("of others")
warnings.warn("a warning")
print("printed")
os.write(2, b"from native code\\n")
subprocess.run([sys.executable, "-c", "print('of a child'); 1/0"])
try:
    raise ValueError("caught")
except ValueError:
    logger.exception("it failed")

def fail():
    raise ValueError("in a thread")

thread = threading.Thread(target=fail)
thread.start()
thread.join()
os.write(1, b"no end of line")
raise RuntimeError("uncaught")
"""


def run(log_format: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, log_format], capture_output=True, text=True, check=False
    )


def test_every_line_is_json() -> None:
    result = run("json")
    assert (result.returncode, result.stdout) == (1, "")
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert all({"timestamp", "level", "logger", "message"} <= line.keys() for line in lines)
    messages = [line["message"] for line in lines]
    for message in (
        "from the log",
        "wanted",
        "printed",
        "from native code",
        "of a child",
        "ZeroDivisionError: division by zero",
        "it failed",
        "ValueError: in a thread",
        "no end of line",
        "the server ends with an error",
    ):
        assert message in messages
    assert "not wanted" not in messages
    assert "of others" not in messages
    assert any("a warning" in message for message in messages)
    assert lines[0]["tokens"] == 3
    assert [line["exc_info"].splitlines()[-1] for line in lines if "exc_info" in line] == [
        "ValueError: caught",
        "RuntimeError: uncaught",
    ]


def test_text_leaves_the_streams_alone() -> None:
    result = run("text")
    assert result.returncode == 1
    assert result.stdout == "printed\nof a child\nno end of line"
    assert "INFO server.test: from the log tokens=3\n" in result.stderr
    assert "DEBUG server.test: wanted\n" in result.stderr
    assert "not wanted" not in result.stderr
    assert "\nfrom native code\n" in result.stderr
    assert result.stderr.endswith("RuntimeError: uncaught\n")
