"""The page for operators, in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from server.rpc.client import Client
from server.rpc.generated.fathom.v1 import inference_pb2
from tests.e2e.browser import Browser, browser
from tests.e2e.calls import assert_generates
from tests.e2e.running_server import PATIENCE, RunningServer

PAGE_MILLISECONDS = 5000


def dom(url: str, directory: Path) -> str:
    """Return the page as the browser has it once its script has read the metrics."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is absent; .ci/install installs it where it can")
    result = subprocess.run(
        [
            browser,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            f"--user-data-dir={directory}",
            f"--virtual-time-budget={PAGE_MILLISECONDS}",
            *("--dump-dom", url),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return result.stdout


def test_it_shows_what_the_metrics_have(demo_server: RunningServer, tmp_path: Path) -> None:
    with demo_server.client() as client:
        assert_generates(client)
        model = client.get_model()
    page = dom(demo_server.metrics_url.replace("/metrics", "/"), tmp_path)
    assert "the engine is up" in page
    rows = re.findall(r'<th scope="row">(\d+)</th><td>([\d.,]+)</td>', page)
    assert {int(depth): float(perplexity.replace(",", "")) for depth, perplexity in rows} == {
        row.decode_layers: pytest.approx(row.quality.perplexity, abs=0.006) for row in model.depths
    }
    (label,) = re.findall(r'aria-label="Agreement against speed\. ([^"]+)"', page)
    shown = {int(depth) for depth in re.findall(r"depth (\d+):", label)}
    assert shown == {level.decode_layers for level in model.levels}
    assert len(re.findall(r'<rect class="bar"', page)) == model.num_layers
    assert re.search(rf"<dt>{model.levels[0].name}</dt><dd[^>]*>in force</dd>", page)
    probes = re.findall(r'<th scope="row">([a-z]+)</th><td>([\d.,]+) ± [\d.,]+</td>', page)
    assert {name: float(ratio) for name, ratio in probes} == {
        level.name: pytest.approx(level.writing.ratio, abs=0.006) for level in model.levels
    }
    assert "the setting repair asks for none" in page


PROMPT = "def add(a, b):\n    return a + b\n\ndef "


def has(element_id: str, text: str) -> str:
    """Return a condition of JavaScript: an element of the page has that text."""
    return f"document.getElementById({element_id!r})?.textContent.includes({text!r})"


def open_page(page: Browser, server: RunningServer) -> None:
    page.open(server.metrics_url.replace("/metrics", "/"))
    page.wait_for(has("prompt-note", "A depth is "))
    page.wait_for(has("state", "the engine is up"))


def test_one_prompt_at_two_depths_by_keyboard(demo_server: RunningServer, tmp_path: Path) -> None:
    with demo_server.client() as client:
        expected = [greedy(client, layers) for layers in (16, 5)]
    with browser(tmp_path) as page:
        open_page(page, demo_server)
        for element_id, text in (
            ("prompt", PROMPT),
            ("depth-0", "16"),
            ("depth-1", "5"),
            ("max-tokens", "12"),
        ):
            page.tab_to(element_id)
            page.type(text)
        page.tab_to("run")
        page.press("Enter")
        for side, layers in enumerate((16, 5)):
            page.wait_for(has(f"answer-note-{side}", "tokens, "))
            assert page.value(f"document.getElementById('answer-title-{side}').textContent") == (
                f"Depth {layers}"
            )
        page.wait_for("document.querySelector('#answers mark')")
        shown = [
            page.value(f"document.getElementById('answer-{side}').textContent") for side in (0, 1)
        ]
        assert shown == expected

        page.tab_to("depth-1")
        page.type("99")
        page.tab_to("prompt")
        page.press("Enter", ctrl=True)
        page.wait_for(has("answer-note-1", "depth.layers: got 99, allowed: 1 to 16"))
        page.wait_for(has("answer-note-0", "tokens, "))


def greedy(client: Client, layers: int) -> str:
    request = inference_pb2.GenerateRequest(
        prompt=PROMPT,
        sampling=inference_pb2.SamplingParams(temperature=0),
        stop=inference_pb2.StopConditions(max_tokens=12),
    )
    request.depth.layers = layers
    return client.generate(request).text


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_fits_the_window(
    demo_server: RunningServer, tmp_path: Path, width: int, dark: bool
) -> None:
    with browser(tmp_path) as page:
        page.show(width, dark=dark)
        open_page(page, demo_server)
        page.wait_for("document.querySelector('#influence svg')")
        assert page.value("document.documentElement.scrollWidth") == width
        paper = page.value("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 0
