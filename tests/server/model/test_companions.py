"""The files beside the weights: each of them, damaged in every way, is refused by name."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.checkpoint import CheckpointError
from server.config import load_settings
from server.model.companions import check_companions
from server.model.inputs import StartError, read_inputs
from server.model.source import DEMO_MODEL
from tests.pruning.test_checkpoint_file import DAMAGES, Damage, outcome

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
TEXT_FILES = ("chat_template.jinja", "additional_chat_templates/tools.jinja")
# Of a text that is no JSON, they are no damage.
TEXT_DAMAGES = ("byte order mark", "UTF-16", "Latin-1", "a directory", "a link to nothing")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, directory, ignore=shutil.ignore_patterns("*.py*", "__pycache__"))
    (directory / "additional_chat_templates").mkdir()
    return directory


def refused(model: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}"):
        check_companions(model, {})


@pytest.mark.parametrize("damage", [damage for damage, _ in DAMAGES.values()], ids=DAMAGES)
@pytest.mark.parametrize("name", JSON_FILES)
def test_a_damaged_file_is_named(model: Path, name: str, damage: Damage) -> None:
    (model / name).unlink(missing_ok=True)
    damage(model / name)
    refused(model, f"{model / name}: ")


@pytest.mark.parametrize("damage", TEXT_DAMAGES)
@pytest.mark.parametrize("name", TEXT_FILES)
def test_a_damaged_template_is_named(model: Path, name: str, damage: str) -> None:
    (model / name).unlink(missing_ok=True)
    DAMAGES[damage][0](model / name)
    refused(model, f"{model / name}: ")


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja", "README.md"]
)
def test_a_file_that_may_be_missing(model: Path, name: str) -> None:
    (model / name).unlink()
    check_companions(model, {})


def test_a_tokenizer_may_not_be_missing(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    refused(model, f"{model}: holds no tokenizer, allowed: one of tokenizer.json, ")
    check_companions(model, {"tokenizer": "elsewhere"})
    (model / "tokenizer.model").touch()
    check_companions(model, {})


FIELDS: list[tuple[str, str, Any, str]] = [
    ("config.json", "num_hidden_layers", "16", "an integer, 1 or more"),
    ("config.json", "hidden_size", 0, "an integer, 1 or more"),
    ("config.json", "vocab_size", 2048.5, "an integer, 1 or more"),
    ("config.json", "num_attention_heads", True, "an integer, 1 or more"),
    ("config.json", "num_key_value_heads", [1], "an integer, 1 or more"),
    ("config.json", "architectures", "LlamaForCausalLM", "a list of names"),
    ("config.json", "architectures", [None], "a list of names"),
    ("config.json", "model_type", 3, "a string"),
    ("config.json", "rope_scaling", [], "an object"),
    ("config.json", "rope_theta", 0, "a number above 0"),
    ("config.json", "eos_token_id", "</s>", "the number of a token, or a list of such"),
    ("config.json", "tie_word_embeddings", "yes", "true or false"),
    ("config.json", "dtype", 16, "a string"),
    ("generation_config.json", "temperature", -0.5, "a number from 0 to 2"),
    ("generation_config.json", "temperature", "hot", "a number from 0 to 2"),
    ("generation_config.json", "temperature", 2.5, "a number from 0 to 2"),
    ("generation_config.json", "min_new_tokens", "3", "an integer, 0 or more"),
    ("generation_config.json", "stop_strings", 5, "a string, or a list of such"),
    ("generation_config.json", "stop_strings", ["a", 5], "a string, or a list of such"),
    ("generation_config.json", "top_k", 2**31, "an integer from -1 to 2147483647"),
    ("generation_config.json", "repetition_penalty", math.inf, "a number above 0"),
    ("generation_config.json", "eos_token_id", 2**64, "the number of a token, or a list"),
    ("generation_config.json", "top_p", 1.5, "a number above 0, at most 1"),
    ("generation_config.json", "top_k", 2.5, "an integer from -1 to 2147483647"),
    ("generation_config.json", "repetition_penalty", 0, "a number above 0"),
    ("generation_config.json", "eos_token_id", [1, "2"], "the number of a token, or a list"),
    ("generation_config.json", "eos_token_id", -1, "the number of a token, or a list"),
    ("generation_config.json", "do_sample", "false", "true or false"),
    ("tokenizer_config.json", "chat_template", 7, "a string, or a list of objects"),
    ("tokenizer_config.json", "chat_template", [{"name": "a"}], "a string, or a list of objects"),
    ("tokenizer_config.json", "eos_token", 2, 'a string, or an object with a string "content"'),
    ("tokenizer_config.json", "bos_token", {"lstrip": True}, "a string, or an object"),
    ("tokenizer_config.json", "added_tokens_decoder", {"x": {"content": "a"}}, "an object of"),
    ("tokenizer_config.json", "model_max_length", "512", "a number"),
    ("tokenizer_config.json", "tokenizer_class", ["A"], "a string"),
    ("chat_template.json", "chat_template", {}, "a string"),
    ("added_tokens.json", "<extra>", "7", "an integer, 0 or more"),
]


@pytest.mark.parametrize(("name", "field", "value", "allowed"), FIELDS)
def test_a_field_of_the_wrong_type_is_named(
    model: Path, name: str, field: str, value: Any, allowed: str
) -> None:
    path = model / name
    content = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps({**content, field: value}))
    refused(model, f"{path}: {field}: found ")
    with pytest.raises(CheckpointError, match=re.escape(f"allowed: {allowed}")):
        check_companions(model, {})


OLDER: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"torch_dtype": "float32", "dtype": None, "rope_scaling": None}),
    ("config.json", {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "{{ 1 }}"}]}),
    ("tokenizer_config.json", {"eos_token": {"__type": "AddedToken", "content": "<|end|>"}}),
    ("tokenizer_config.json", {"model_max_length": 1e30}),
    ("generation_config.json", {"eos_token_id": [0, 1], "temperature": None, "top_k": 0}),
    ("chat_template.json", {"chat_template": "{{ messages }}"}),
    ("added_tokens.json", {"<extra>": 2047}),
]


@pytest.mark.parametrize(("name", "content"), OLDER)
def test_older_layouts_are_taken(model: Path, name: str, content: dict[str, Any]) -> None:
    path = model / name
    before = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps({**before, **content}))
    check_companions(model, {})


def test_heads_that_do_not_divide(model: Path) -> None:
    path = model / "config.json"
    config = json.loads(path.read_bytes())
    path.write_text(
        json.dumps({**config, "num_key_value_heads": config["num_attention_heads"] + 1})
    )
    refused(model, f"{path}: num_key_value_heads: found ")
    config["head_dim"] = None
    path.write_text(json.dumps({**config, "hidden_size": config["hidden_size"] + 1}))
    refused(model, f"{path}: hidden_size: found ")


def test_a_tokenizer_that_is_none(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text("{}")
    refused(model, f"{path}: is no tokenizer: ")
    content = json.loads((DEMO_MODEL / "tokenizer.json").read_bytes())
    del content["model"]
    path.write_text(json.dumps(content))
    refused(model, f"{path}: is no tokenizer: ")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
FIELD_NAMES = sorted({(name, field) for name, field, _, _ in FIELDS})


@given(where=st.sampled_from(FIELD_NAMES), value=values)
def test_any_value_is_taken_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, where: tuple[str, str], value: Any
) -> None:
    name, field = where
    directory = tmp_path_factory.mktemp("model")
    for each in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO_MODEL / each, directory)
    path = directory / name
    content = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps({**content, field: value}))
    said = outcome(lambda: check_companions(directory, {}))
    assert said == "read" or said.startswith(f"{path}: ")


def start_error(model: Path, state: Path, **others: str) -> str:
    with pytest.raises(StartError) as caught:
        read_inputs(load_settings({"model": str(model), "state_dir": str(state), **others}))
    assert not state.exists()
    return str(caught.value)


def test_a_server_is_not_started_with_them(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text("[")
    found = start_error(model, tmp_path / "state")
    assert found.startswith(f"model: {model / 'generation_config.json'}: not a complete JSON")


@pytest.mark.parametrize("name", ["mo[d]el", "mod*l", "model?"])
def test_paths_that_vllm_takes_for_patterns(model: Path, tmp_path: Path, name: str) -> None:
    renamed = model.rename(tmp_path / name)
    found = start_error(renamed, tmp_path / "state")
    assert (
        found
        == f"model: {renamed}: allowed: a path without *, ? and [, which vLLM takes for patterns"
    )
    found = start_error(DEMO_MODEL, tmp_path / "st[a]te", engine="dedicated")
    assert found.startswith(f"state_dir: {tmp_path / 'st[a]te'}: allowed: a path without")


@pytest.mark.parametrize("name", ["mo del", "mo'd\"el", "模型-ü", "a.b", "-model", "mo%20d$el;&"])
def test_paths_that_are_taken(model: Path, tmp_path: Path, name: str) -> None:
    renamed = model.rename(tmp_path / name)
    link = tmp_path / "link"
    link.symlink_to(renamed)
    prints = set()
    for path in (renamed, link):
        settings = load_settings({"model": str(path), "state_dir": str(tmp_path / "state")})
        prints.add(read_inputs(settings).fingerprint)
    assert len(prints) == 1
