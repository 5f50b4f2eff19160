"""What vLLM finds while it loads a model: its reason is the last line, not where to look for it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.test_bad_starts import copied_model, serve


def test_weights_of_another_shape(tmp_path: Path) -> None:
    model = copied_model(tmp_path)
    config = json.loads((model / "config.json").read_bytes())
    config["intermediate_size"] *= 2
    (model / "config.json").write_text(json.dumps(config))
    result = serve(tmp_path, model=model)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fathom: ")]
    assert line.startswith("fathom: engine: ")
    assert "root cause" not in line
    assert str(config["intermediate_size"]) in line
