"""A server that ranks its layers on text that its model has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pruning.text import TextError
from server.config import load_settings
from server.model.inputs import StartError, calibration_texts, read_inputs
from tests.e2e.calls import greedy_request
from tests.e2e.running_server import RunningServer, measurements_in, running_server
from tests.fathom_command import fathom_in_process

TOKENS = 1024
WRITTEN = "Writing text to rank the layers on: 100 %"
OWN = {"calibration": "own", "calibration_tokens": TOKENS}


@pytest.fixture(scope="module")
def server(
    stories_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("own")
    with running_server(directory, model=stories_model, http_port=None, **OWN) as server:
        yield server


def test_the_model_writes_first_and_once(
    server: RunningServer, stories_model: Path, tmp_path: Path
) -> None:
    assert server.log.index(WRITTEN) < server.log.index("Ranking the layers")
    with server.client() as client:
        first = client.get_plan().plan
        assert client.get_status().startup_seconds["text"] > 0
        answer = client.generate(greedy_request("Once upon a time", 8, depth=3)).token_ids
    state = server.copy_state(tmp_path)
    with (
        running_server(
            tmp_path / "again", model=stories_model, state_dir=state, **OWN
        ) as restarted,
        restarted.client() as client,
    ):
        assert WRITTEN not in restarted.log
        assert measurements_in(restarted.log) == []
        assert client.get_plan().plan == first
        again = client.generate(greedy_request("Once upon a time", 8, depth=3))
        assert again.token_ids == answer
    settings = load_settings({"model": str(stories_model), "state_dir": str(state), **OWN})
    written = calibration_texts(settings, stories_model)
    assert "Once upon a time" in "".join(written)
    # The text is long enough, though to read what was cut may take a few tokens less.
    assert sum(map(len, written)) > TOKENS
    assert read_inputs(settings).texts == written


@pytest.mark.parametrize("command", ["heal", "export"])
def test_commands_without_an_engine_say_where_text_comes_from(
    stories_model: Path, tmp_path: Path, command: str
) -> None:
    out = [tmp_path / "out"] if command == "export" else []
    model = ("--model", stories_model, "--state-dir", tmp_path / "state")
    result = fathom_in_process(command, *out, *model, "--calibration", "own", "--depth", "3")
    assert result.returncode == 2, result.stderr
    assert "calibration: got 'own', but " in result.stderr
    assert "a file, which 'fathom own-text' writes" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("more", [{"engine": "dedicated"}, {"quantize": "gptq-4bit"}])
def test_what_is_needed_before_an_engine_runs_is_not_written(
    stories_model: Path, tmp_path: Path, more: dict[str, str]
) -> None:
    settings = load_settings(
        {"model": str(stories_model), "state_dir": str(tmp_path), "calibration": "own", **more}
    )
    with pytest.raises(StartError, match=r"calibration: got 'own'.*without quantize"):
        read_inputs(settings)


def test_a_file_of_that_name_comes_first(
    stories_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(
        {"model": str(stories_model), "state_dir": str(tmp_path / "state"), "calibration": "own"}
    )
    assert read_inputs(settings).texts is None
    Path("own").mkdir()
    with pytest.raises(TextError, match="own: "):
        calibration_texts(settings, stories_model)
    Path("own/text.txt").write_text("Of cats and dogs.")
    assert read_inputs(settings).texts == ["Of cats and dogs."]
