"""vLLM's arguments and environment for the elastic engine."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.engine.arguments import (
    RESERVED,
    EngineConfig,
    base_arguments,
    check_engine_args,
    cpu_arguments,
    gpu_arguments,
    prepare_cpu_environment,
    prepare_environment,
    refusal,
)
from server.engine.elastic.architectures import elastic_architecture
from server.engine.elastic.unsupported_arguments import check_supported

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs

_RESERVED = {
    **RESERVED,
    "enforce_eager": None,
    "logits_processors": None,
}
# About the size of one model's compiled layers.
_COMPILED_BYTES = 4 << 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ElasticConfig(EngineConfig):
    """Configuration of the elastic engine."""

    # None: on CPU only, where it is known to be faster.
    compile_layers: bool | None = None
    # Keeps compiled code for the next start; None leaves that to torch.
    compile_cache: Path | None = None


def compiles_layers(config: ElasticConfig) -> bool:
    """Return whether the layers are to be compiled."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu() if config.compile_layers is None else config.compile_layers


def vllm_arguments(config: ElasticConfig) -> AsyncEngineArgs:
    """Return vLLM's arguments for ``config``.

    Raises:
        InvalidArgument: ``engine_args`` has a name that vLLM does not know or that Fathom sets, or
            asks for what the elastic engine cannot do, or transformers cannot read the model's
            configuration.
        UnsupportedArchitecture: The model cannot run at several depths.
    """
    from transformers import AutoConfig
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform

    check_engine_args(config.engine_args, _RESERVED)
    check_supported(config.engine_args, config.ranks, on_cpu=current_platform.is_cpu())
    try:
        model_config = AutoConfig.from_pretrained(
            config.model, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # the package documents no base class of what it raises
        raise refusal(error, config) from error
    overrides = dict(config.engine_args.get("hf_overrides", {}))
    overrides["architectures"] = [elastic_architecture(model_config.architectures or [])]
    arguments: dict[str, Any] = {
        **base_arguments(config),
        "enforce_eager": True,
        "logits_processors": ["server.engine.elastic.row_tracker:RowTracker"],
        "worker_extension_cls": "server.engine.elastic.worker_extension.ElasticWorkerExtension",
    }
    if current_platform.is_cpu():
        prepare_cpu_environment(config.model)
        quantized = getattr(model_config, "quantization_config", None) is not None
        arguments |= cpu_arguments(config, quantized=quantized)
    else:
        arguments |= gpu_arguments(config)
    return AsyncEngineArgs(**{**arguments, **config.engine_args, "hf_overrides": overrides})


def prepare_elastic_environment(compile_cache: Path | None = None) -> None:
    """Set what vLLM and its processes read from the environment, where the operator has not."""
    prepare_environment()
    # The newer model runner, GPU only, has another interface for what the row tracker does.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    if compile_cache is not None and _can_keep(compile_cache):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compile_cache))


def _can_keep(directory: Path) -> bool:
    """Return whether compiled code can be written and run there; torch would fail if it cannot.

    Where it cannot, torch compiles into a directory for temporary files.
    """
    try:
        # The code is run, so nobody else may write there.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_COMPILED_BYTES))
        if os.statvfs(directory).f_flag & os.ST_NOEXEC:
            raise PermissionError(errno.EACCES, "its volume forbids exec", str(directory))
    except OSError as error:
        logger.warning("%s cannot keep compiled code for the next start: %s", directory, error)
        return False
    return True
