"""The page for operators, in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

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
