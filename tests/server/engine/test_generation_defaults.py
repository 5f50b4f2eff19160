"""``generation_config.json``, field by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.engine.base import SamplingOptions
from server.engine.generation_defaults import FILE, GenerationDefaults
from server.engine.sampling import sampling_params


def read(directory: Path, **config: Any) -> GenerationDefaults:
    (directory / FILE).write_text(json.dumps(config), "utf-8")
    return GenerationDefaults.of_model(directory)


def test_what_is_honoured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = read(
        tmp_path, do_sample=False, temperature=0.7, min_new_tokens=3, stop_strings=["###", "\n"]
    )
    assert found == GenerationDefaults({"temperature": 0.0, "min_tokens": 3}, ("###", "\n"))
    assert read(tmp_path, stop_strings="###").stop == ("###",)
    assert read(tmp_path, do_sample=True, temperature=0.7) == GenerationDefaults()
    assert not caplog.records


@pytest.mark.parametrize(
    "config",
    [
        {"num_beams": 4},
        {"no_repeat_ngram_size": 3},
        {"suppress_tokens": [1, 2]},
        {"bad_words_ids": [[5]]},
        {"typical_p": 0.9},
        {"guidance_scale": 1.5},
        {"forced_eos_token_id": 2},
        {"a_field_of_the_future": "on"},
    ],
)
def test_what_has_no_effect_is_named(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read(tmp_path, **config) == GenerationDefaults()
    assert f"these fields have no effect: {config}" in caplog.text


def test_neutral_values_are_not_worth_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(
        tmp_path,
        num_beams=1,
        typical_p=1.0,
        guidance_scale=None,
        output_scores=False,
        max_new_tokens=512,
        eos_token_id=[1, 2],
        transformers_version="4.40.0",
        _from_model_config=True,
    )
    assert not caplog.records


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_a_damaged_file_is_reported(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert GenerationDefaults.of_model(tmp_path) == GenerationDefaults()
    assert f"{FILE} is not used" in caplog.text


def test_no_file_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert GenerationDefaults.of_model(tmp_path) == GenerationDefaults()
    assert not caplog.records


def test_a_default_of_min_tokens_gives_way_to_a_short_answer() -> None:
    params = sampling_params(SamplingOptions(max_tokens=2), {"min_tokens": 3})
    assert (params.min_tokens, params.max_tokens) == (2, 2)
    params = sampling_params(SamplingOptions(max_tokens=9, min_tokens=1), {"min_tokens": 3})
    assert params.min_tokens == 1
