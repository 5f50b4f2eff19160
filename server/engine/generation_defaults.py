"""Defaults for requests, from a model's ``generation_config.json``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FILE = "generation_config.json"

# Fields that vLLM reads itself, or that say nothing about which tokens are chosen.
_READ_ELSEWHERE = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "eos_token_id",
        "bos_token_id",
        "pad_token_id",
        "decoder_start_token_id",
        "transformers_version",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "return_dict_in_generate",
        "return_legacy_cache",
        "disable_compile",
        "compile_config",
        "low_memory",
        "chat_format",
        "max_window_size",
    }
)
# The length of an answer comes from the request or the context.
_LENGTHS = frozenset({"max_length", "max_new_tokens", "min_length", "max_time"})
# Values with which a field changes nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "typical_p": (1.0,),
    "length_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "temperature_last_layer": (1.0,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "assistant_confidence_threshold": (0.4,),
}


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The fields that have an effect, apart from those that vLLM reads itself."""

    sampling: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()

    @staticmethod
    def of_model(directory: Path) -> GenerationDefaults:
        """Read the file of a checkpoint, and warn of every field that has no effect here."""
        try:
            config = json.loads((directory / FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return GenerationDefaults()
        except (OSError, ValueError) as error:
            logger.warning("%s is not used: %s", directory / FILE, error)
            return GenerationDefaults()
        if not isinstance(config, dict):
            logger.warning("%s is not used: it holds no object", directory / FILE)
            return GenerationDefaults()
        ignored = {name: value for name, value in config.items() if _has_no_effect(name, value)}
        if ignored:
            logger.warning("%s: these fields have no effect: %s", directory / FILE, ignored)
        return GenerationDefaults(_sampling(config), _stop_strings(config.get("stop_strings")))


def _sampling(config: Mapping[str, Any]) -> dict[str, Any]:
    sampling: dict[str, Any] = {}
    if config.get("do_sample") is False:
        sampling["temperature"] = 0.0  # whatever temperature stands beside it
    min_tokens = config.get("min_new_tokens")
    if isinstance(min_tokens, int) and min_tokens > 0:
        sampling["min_tokens"] = min_tokens
    return sampling


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        return ()
    return tuple(string for string in strings if isinstance(string, str) and string)


def _has_no_effect(name: str, value: object) -> bool:
    if name.startswith(("_", "output_")) or name in _READ_ELSEWHERE | _LENGTHS:
        return False
    if name in ("do_sample", "min_new_tokens", "stop_strings"):
        return False
    return value not in (None, False, [], {}) and value not in _NEUTRAL.get(name, ())
