"""A real Chromium without a window, driven over its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

# What keys are to a page: DOM's name, the code on the keyboard, the old number, and their text.
_KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r")}


class Browser:
    """One page of the browser."""

    def __init__(self, commands: IO[bytes], answers: IO[bytes]) -> None:
        """``commands`` and ``answers`` are ends of pipes; messages in them end with a zero byte."""
        self._commands = commands
        self._answers = answers
        self._received = bytearray()
        self._num_sent = 0
        self._session = ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def close(self) -> None:
        self._session = ""
        self._call("Browser.close")

    def show(self, width: int, *, dark: bool = False) -> None:
        """Make the window ``width`` pixels wide, light or dark."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, awaited if it is a promise."""
        result = self._call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Return once the condition of JavaScript holds, which is looked at in every frame."""
        while not self.value(
            "new Promise((done) => { let left = 600; const look = () => { "
            f"if ({condition}) done(true); else if (left--) setTimeout(look, 50); "
            "else done(false); }; look(); })"
        ):
            pytest.fail(f"{condition} does not hold:\n{self.value('document.body.innerText')}")

    def press(self, key: str, *, ctrl: bool = False) -> None:
        code, number, text = _KEYS[key]
        common = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        modifiers = 2 if ctrl else 0
        down = {"type": "keyDown", "modifiers": modifiers, **common}
        self._call("Input.dispatchKeyEvent", **down, **({"text": text} if text else {}))
        self._call("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **common)

    def type(self, text: str) -> None:
        """Type into what has the focus, in place of what it holds."""
        self.value("document.activeElement.select()")
        self._call("Input.insertText", text=text)

    def tab_to(self, element_id: str) -> None:
        """Press Tab until the element has the focus."""
        for _ in range(30):
            if self.value("document.activeElement.id") == element_id:
                return
            self.press("Tab")
        pytest.fail(f"Tab does not reach {element_id}")

    def screenshot(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._num_sent += 1
        message = {"id": self._num_sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self._num_sent:
                assert "error" not in answer, answer["error"]
                result: dict[str, Any] = answer["result"]
                return result

    def _message(self) -> bytes:
        while (end := self._received.find(0)) < 0:
            received = self._answers.read(1 << 16)
            assert received, "the browser has ended"
            self._received += received
        message = bytes(self._received[:end])
        del self._received[: end + 1]
        return message


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """Yield a browser that keeps its files in ``directory``; skip the test if there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is absent; .ci/install installs it where it can")
    with ExitStack() as stack:
        ends = [stack.enter_context(os.fdopen(end, mode, 0)) for end, mode in _pipe_ends()]
        read_end, commands, answers, write_end = ends
        # The browser reads its commands from descriptor 3 and writes its answers to 4.
        redirect = f'exec "$0" "$@" 3<&{read_end.fileno()} 4>&{write_end.fileno()}'
        process = subprocess.Popen(
            [
                *("bash", "-c", redirect),
                *(program, "--headless=new", "--no-sandbox", "--disable-gpu"),
                *("--disable-dev-shm-usage", "--remote-debugging-pipe", "--hide-scrollbars"),
                f"--user-data-dir={directory / 'profile'}",
            ],
            pass_fds=(read_end.fileno(), write_end.fileno()),
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        read_end.close()
        write_end.close()
        page = Browser(commands, answers)
        yield page
        page.close()


def _pipe_ends() -> list[tuple[int, str]]:
    """Return the ends of two pipes: where commands are read and written, and answers."""
    (read_end, commands), (answers, write_end) = os.pipe(), os.pipe()
    return [(read_end, "rb"), (commands, "wb"), (answers, "rb"), (write_end, "wb")]
