"""The quantized model in the state directory: made once, and trusted only as it was written."""

from __future__ import annotations

import asyncio
import json
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from pruning.fingerprint import model_fingerprint
from pruning.quantization import QuantizationFailed, plan_of_base
from server.config import Settings, load_settings
from server.engine.elastic import compatibility
from server.model import inputs
from server.model.exporter import Exporter
from server.model.inputs import StartError, calibration_texts, read_inputs
from server.model.quantized import QuantizedModel, checked_quantization
from server.model.source import find_model
from server.state import StateError
from tests.pruning.quantization.test_checkpoint import worker_of
from tests.pruning.surgery.exporting import plan_of


@pytest.fixture(autouse=True)
def cpu_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is refused without vLLM's kernel go on to the point of the tests."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)


def settings_of(model: Path, state: Path, **others: object) -> Settings:
    few: dict[str, object] = {"calibration_tokens": "512", "quantize": "gptq-4bit"}
    return load_settings({"model": str(model), "state_dir": str(state), **few, **others})


def quantized_model(settings: Settings) -> QuantizedModel:
    source = find_model(settings.model)
    quantization = checked_quantization(settings, source.directory)
    assert quantization is not None
    texts = calibration_texts(settings, source.directory)
    fingerprint = model_fingerprint(source.directory)
    return QuantizedModel(settings, source, fingerprint, texts, quantization)


@pytest.fixture(scope="module")
def settings(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return settings_of(small, tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def kept(settings: Settings) -> QuantizedModel:
    """A model that has been quantized and kept."""
    model = quantized_model(settings)
    assert model.kept_fingerprint() is None
    done: list[tuple[int, int]] = []
    fingerprint = asyncio.run(model.prepare(lambda *layers: done.append(layers)))
    assert done[-1] == (3, 3)
    assert fingerprint == model_fingerprint(model.directory) == model.kept_fingerprint()
    return model


def unexpected(done: int, total: int) -> None:
    raise AssertionError("the model is quantized once more")


async def test_it_is_made_once(settings: Settings, kept: QuantizedModel) -> None:
    again = quantized_model(settings)
    assert await again.prepare(unexpected) == model_fingerprint(kept.directory)
    assert again.directory == kept.directory


@pytest.mark.parametrize(
    "others",
    [
        {"quantize": "gptq-8bit"},
        {"quantize_group_size": "32"},
        {"quantize_act_order": "true"},
        {"calibration_tokens": "513"},
        {"max_context": "100"},
    ],
)
def test_other_settings_make_another_one(
    small: Path, settings: Settings, kept: QuantizedModel, others: dict[str, str]
) -> None:
    other = quantized_model(settings_of(small, settings.state_dir, **others))
    assert other.directory != kept.directory
    assert other.kept_fingerprint() is None


def flip(path: Path) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


Damage = Callable[[Path], object]
DAMAGES: dict[str, Damage] = {
    "flipped": lambda directory: flip(directory / "model.safetensors"),
    "truncated": lambda directory: (directory / "model.safetensors").write_bytes(b""),
    "missing": lambda directory: (directory / "tokenizer.json").unlink(),
    "added": lambda directory: (directory / "model-2.safetensors").touch(),
    "gone": shutil.rmtree,
    "half a record": lambda directory: directory.with_suffix(".json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found(kept: QuantizedModel, tmp_path: Path, damage: Damage) -> None:
    copy = tmp_path / kept.directory.name
    shutil.copytree(kept.directory, copy)
    record = Path(shutil.copy(kept.directory.with_suffix(".json"), tmp_path))
    assert kept._entry.load(record).fingerprint == kept.kept_fingerprint()
    damage(copy)
    with pytest.raises(StateError):
        kept._entry.load(record)


def test_record_of_something_else_is_no_record(kept: QuantizedModel, tmp_path: Path) -> None:
    record = tmp_path / kept.directory.with_suffix(".json").name
    document = json.loads(kept.directory.with_suffix(".json").read_bytes())
    document["key"]["bits"] = 8
    record.write_text(json.dumps(document))
    with pytest.raises(StateError, match="made for another model or with other settings"):
        kept._entry.load(record)


async def test_damaged_one_is_reported_and_made_anew(
    settings: Settings, kept: QuantizedModel, caplog: pytest.LogCaptureFixture
) -> None:
    fingerprint = kept.kept_fingerprint()
    flip(kept.directory / "model.safetensors")
    assert await quantized_model(settings).prepare(lambda *layers: None) == fingerprint
    assert "is not used and will be made anew: " in caplog.text
    assert "model.safetensors: not what was written" in caplog.text
    assert await quantized_model(settings).prepare(unexpected) == fingerprint


async def test_cancelled_or_killed_it_leaves_nothing_to_trust(small: Path, tmp_path: Path) -> None:
    settings = settings_of(small, tmp_path / "state")
    model = quantized_model(settings)
    making = asyncio.create_task(model.prepare(lambda *layers: None))
    worker = await asyncio.to_thread(worker_of, psutil.Process())
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert not worker.is_running()
    making = asyncio.create_task(model.prepare(lambda *layers: None))
    (await asyncio.to_thread(worker_of, psutil.Process())).kill()
    with pytest.raises(QuantizationFailed, match="was killed"):
        await making
    assert [path.suffix for path in settings.state_dir.iterdir()] == [".lock"]


async def test_what_lies_beside_the_weights_is_that_of_the_source_now(
    small: Path, tmp_path: Path
) -> None:
    source, state = tmp_path / "model", tmp_path / "state"
    shutil.copytree(small, source)
    settings = settings_of(source, state)
    before = quantized_model(settings)
    fingerprint = await before.prepare(lambda *layers: None)
    template, generation = source / "chat_template.jinja", source / "generation_config.json"
    tokenizer = json.loads((source / "tokenizer_config.json").read_bytes())
    template.write_text("{{ messages[0].content }}")
    generation.write_text(json.dumps({"temperature": 0.5}))
    (source / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "padding_side": "left"}))
    after = quantized_model(settings)
    assert after.directory != before.directory
    assert await after.prepare(unexpected) == fingerprint == model_fingerprint(after.directory)
    for name in (template.name, generation.name, "tokenizer_config.json", "tokenizer.json"):
        assert (after.directory / name).read_bytes() == (source / name).read_bytes()
    # The other server that may share the directory goes on with what it has.
    assert (before.directory / template.name).read_bytes() != template.read_bytes()
    weights = [model.directory / "model.safetensors" for model in (before, after)]
    assert weights[0].samefile(weights[1])
    assert await quantized_model(settings).prepare(unexpected) == fingerprint
    # Damage is found in either, and what is made anew is whole.
    flip(weights[1])
    assert await quantized_model(settings).prepare(lambda *layers: None) == fingerprint
    assert model_fingerprint(after.directory) == fingerprint


def test_other_tokens_make_another_one(small: Path, tmp_path: Path) -> None:
    source, state = tmp_path / "model", tmp_path / "state"
    shutil.copytree(small, source)
    keys = [quantized_model(settings_of(source, state))._weights_key]
    tokenizer = json.loads((source / "tokenizer.json").read_bytes())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    keys.append(quantized_model(settings_of(source, state))._weights_key)
    assert keys[0]["tokens"] != keys[1]["tokens"]


def test_a_token_that_the_model_does_not_know(small: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(small, source)
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    found = refusal(source, tmp_path / "state")
    problem = r"calibration: text \d+ \(.*\.\.\.\) has the token \d{3,}, allowed: 0 to 99, .*"
    assert re.fullmatch(problem, found)
    assert found.endswith("its tokenizer has more tokens than the model")


# What a server is started with


def refusal(model: Path, state: Path, **others: object) -> str:
    with pytest.raises(StartError) as caught:
        read_inputs(settings_of(model, state, **others))
    assert not state.exists()
    return str(caught.value)


def test_what_cannot_be_served(small: Path, small_quantized: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    found = refusal(small_quantized, state)
    assert found.startswith(f"quantize: {small_quantized}: is quantized already (gptq), allowed: ")
    found = refusal(small, state, order="prune-then-quantize")
    assert found.startswith("order: got 'prune-then-quantize', allowed: quantize-then-prune with")
    found = refusal(small, state, dtype="float32")
    assert found.startswith("dtype: got 'float32', allowed: auto, bfloat16 or float16")


def test_group_size_that_does_not_fit(stories_model: Path, tmp_path: Path) -> None:
    found = refusal(stories_model, tmp_path / "state")
    assert "down_proj.weight: got 172 in-features, allowed: multiples of 32" in found


def test_a_cpu_without_the_kernel(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(compatibility, "is_for_cpu", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    problem = "vLLM's kernel for weights of 4 bits needs a GPU, or a CPU with AVX-512"
    found = refusal(small, tmp_path / "state")
    assert found == f"quantize: got 'gptq-4bit', allowed: nothing here: {problem}"
    # What is written for another machine is written, with a warning.
    settings = settings_of(small, tmp_path / "state")
    Exporter(settings, find_model(settings.model), model_fingerprint(small))
    expected = f"a server on this machine will not be able to serve the quantized model: {problem}"
    assert caplog.messages == [expected]


def test_experts_that_cannot_be_served(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "experts_problem", lambda tensors: "experts need a GPU")
    found = refusal(small, tmp_path / "state")
    assert found == "quantize: got 'gptq-4bit', allowed: nothing here: experts need a GPU"


def test_plan_of_the_model_before(small: Path, kept: QuantizedModel, tmp_path: Path) -> None:
    plan = plan_of(small, (1,))
    plan.save(tmp_path / "plan.json")
    read = read_inputs(settings_of(small, tmp_path / "state", plan=str(tmp_path / "plan.json")))
    assert read.plan == plan
    fingerprint = model_fingerprint(kept.directory)
    fitted = plan_of_base(plan, kept.directory, fingerprint)
    assert (fitted.removal_order, fitted.model_fingerprint) == (plan.removal_order, fingerprint)


def test_plan_of_the_model_that_is_kept(
    settings: Settings, kept: QuantizedModel, tmp_path: Path
) -> None:
    plan_of(kept.directory).save(tmp_path / "plan.json")
    given = settings.model_copy(update={"plan": tmp_path / "plan.json"})
    assert read_inputs(given).plan == plan_of(kept.directory)
    elsewhere = given.model_copy(update={"state_dir": tmp_path / "state"})
    with pytest.raises(StartError, match="model_fingerprint: the plan is of the model"):
        read_inputs(elsewhere)
