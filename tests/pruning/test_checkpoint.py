from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pruning.checkpoint import CheckpointError, check_checkpoint
from pruning.fingerprint import model_fingerprint, text_fingerprint

SHARD = "model-00002-of-00002.safetensors"


def refused(directory: Path, message: str) -> None:
    for check in (check_checkpoint, model_fingerprint):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            check(directory)


def test_accepts_a_whole_checkpoint(checkpoint: Path) -> None:
    check_checkpoint(checkpoint)


def test_accepts_a_real_checkpoint(stories_model: Path) -> None:
    check_checkpoint(stories_model)
    check_checkpoint(str(stories_model))


def test_refuses_what_is_no_directory(checkpoint: Path) -> None:
    refused(checkpoint / "absent", f"{checkpoint / 'absent'}: not a directory")
    refused(checkpoint / SHARD, f"{checkpoint / SHARD}: not a directory")


def test_refuses_a_missing_configuration(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    refused(checkpoint, f"{checkpoint / 'config.json'}: missing")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a complete JSON document"), ("[]", "allowed: a JSON object")],
)
def test_refuses_a_damaged_configuration(checkpoint: Path, content: str, message: str) -> None:
    (checkpoint / "config.json").write_text(content)
    refused(checkpoint, f"{checkpoint / 'config.json'}: {message}")


def test_refuses_a_directory_without_weights(checkpoint: Path) -> None:
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    (checkpoint / "pytorch_model.bin").touch()
    refused(checkpoint, f"{checkpoint}: holds no weights, allowed: one or more *.safetensors")
    refused(checkpoint, "found config.json, pytorch_model.bin")


def test_refuses_a_missing_shard(checkpoint: Path) -> None:
    (checkpoint / SHARD).unlink()
    refused(
        checkpoint,
        f"{checkpoint / SHARD}: missing, though model.safetensors.index.json names it "
        "(1 of 2 shards are missing)",
    )


def test_refuses_a_dangling_link(checkpoint: Path) -> None:
    (checkpoint / SHARD).unlink()
    (checkpoint / SHARD).symlink_to(checkpoint / "absent")
    refused(checkpoint, f"{checkpoint / SHARD}: not a file, or a link to one that is missing")


def test_refuses_a_damaged_index(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": 1}}))
    refused(checkpoint, f"{index}: weight_map: allowed: an object of file names")
    index.write_text("")
    refused(checkpoint, f"{index}: not a complete JSON document")


def test_every_truncation_is_refused(checkpoint: Path) -> None:
    path = checkpoint / SHARD
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    for length in [*range(header_end + 2), (header_end + len(data)) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: ") as caught:
            check_checkpoint(checkpoint)
        assert f"{length} bytes" in str(caught.value)


def test_a_truncated_file_says_how_much_is_there(checkpoint: Path) -> None:
    path = checkpoint / SHARD
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    refused(checkpoint, f"{path}: truncated: {len(data) - 100} bytes, its header says {len(data)}")
    path.write_bytes(data + b"\0")
    refused(checkpoint, f"{path}: damaged: {len(data) + 1} bytes, its header says {len(data)}")


def header_of(tensors: object) -> bytes:
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 4096, "not a safetensors file (4096 bytes)"),
        (b"\x00" * 4096, "not a safetensors file (4096 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"\x04" + bytes(7) + b"oops", "damaged: its header does not describe tensors"),
        (header_of([1]), "damaged: its header does not describe tensors"),
        (header_of({"w": {"dtype": "F32"}}), "damaged: its header does not describe tensors"),
        (
            header_of({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}) + bytes(8),
            "damaged: ",
        ),
        (
            header_of({"w": {"dtype": "?", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
            "damaged: ",
        ),
    ],
)
def test_refuses_damaged_weights(checkpoint: Path, content: bytes, message: str) -> None:
    (checkpoint / SHARD).write_bytes(content)
    refused(checkpoint, f"{checkpoint / SHARD}: {message}")


def test_a_copy_has_the_same_fingerprint(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    config = {
        "num_hidden_layers": 2,
        "model_type": "llama",
        "transformers_version": "5.0",
        "_name_or_path": "elsewhere",
    }
    (copy / "config.json").write_text(json.dumps(config, indent=4))
    assert model_fingerprint(copy) == model_fingerprint(checkpoint)
    assert re.fullmatch("sha256:[0-9a-f]{64}", model_fingerprint(checkpoint))


def test_another_model_has_another_fingerprint(checkpoint: Path) -> None:
    seen = {model_fingerprint(checkpoint)}

    def differs() -> bool:
        fingerprint = model_fingerprint(checkpoint)
        new = fingerprint not in seen
        seen.add(fingerprint)
        return new

    (checkpoint / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    assert differs()

    tensors = load_file(checkpoint / SHARD)
    (weight,) = tensors.values()
    weight[40, 3] += 1
    save_file(tensors, checkpoint / SHARD)
    assert differs()

    save_file({"another.name": weight}, checkpoint / SHARD)
    assert differs()

    (checkpoint / SHARD).rename(checkpoint / "zzz.safetensors")
    (checkpoint / "model.safetensors.index.json").unlink()
    assert differs()


def test_a_large_file_is_sampled_throughout(checkpoint: Path) -> None:
    # 8 MiB: too large to be read whole, and every tensor is larger than the stride.
    path = checkpoint / SHARD
    for number in range(8):
        tensors = {f"layer.{i}": torch.zeros(1 << 18) for i in range(8)}
        tensors[f"layer.{number}"] += 1
        save_file(tensors, path)
        fingerprint = model_fingerprint(checkpoint)
        assert fingerprint == model_fingerprint(checkpoint)
        tensors[f"layer.{number}"] += 1
        save_file(tensors, path)
        assert fingerprint != model_fingerprint(checkpoint)


def test_text_fingerprint_sees_order_and_boundaries() -> None:
    texts = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [], ["", "abc"], ["\ud800"]]
    assert len({text_fingerprint(text) for text in texts}) == len(texts)
    assert text_fingerprint(iter(["ab", "c"])) == text_fingerprint(["ab", "c"])
