"""Models that settings name."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from server.errors import InvalidArgument
from server.model.source import find_model


def test_a_directory_without_a_checkpoint_does_not_hide_a_model_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_model("demo") == find_model(None)
    (tmp_path / "demo").mkdir()  # of a report, say
    assert find_model("demo") == find_model(None)
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert find_model("demo").directory == Path("demo")
    (tmp_path / "model").mkdir()
    assert find_model("model").directory == Path("model")


@pytest.mark.parametrize("model", ["x" * 5000, "./" + "x" * 300, "~nobody-like-this/model", "a b"])
def test_names_that_no_model_can_have(model: str) -> None:
    with pytest.raises(InvalidArgument, match="allowed: an existing directory or a Hugging Face"):
        find_model(model)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/proc/nowhere"),
        NotADirectoryError(20, "Not a directory", "/file/hub"),
        RuntimeError("closed"),
        AssertionError(),
    ],
)
def test_whatever_keeps_a_model_from_being_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(InvalidArgument, match="model: got 'some/model', allowed: ") as caught:
        find_model("some/model")
    assert f"HF_HOME={tmp_path / 'file'}" in str(caught.value)
    assert (str(error) or "AssertionError") in str(caught.value)


@pytest.mark.parametrize("name", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_cache_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The client reads its variables when it is imported, so what they name is set here, too."""
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, str(tmp_path / "file"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidArgument, match=f"{name}={tmp_path / 'file'}"):
        find_model("some/model")
