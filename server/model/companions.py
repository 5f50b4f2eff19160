"""Checks of the files beside a model's weights, made before anything is loaded.

Only fields that vLLM or transformers read are checked. Chat templates are programs: their faults
are reported to the clients that send chats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pruning.checkpoint_file import (
    CheckpointError,
    read_object,
    read_optional_object,
    read_text,
    refuse,
)

Check = tuple[Callable[[Any], bool], str]

_TEMPLATES = "additional_chat_templates"
# Each of these files holds a tokenizer, or the main part of one.
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
_TIKTOKEN = "*.tiktoken"
_MAX_INT = 2**31 - 1  # of vLLM's arrays


def check_companions(directory: Path, engine_args: Mapping[str, Any]) -> None:
    """Check the configuration and the files beside the weights.

    Raises :class:`CheckpointError`, naming the file, the field, what was found and what is
    allowed.
    """
    check_config(directory / "config.json")
    _check_fields(directory / "generation_config.json", _GENERATION)
    if "tokenizer" not in engine_args:  # else the tokenizer is not that of this directory
        _check_tokenizer(directory)


def check_config(path: Path) -> None:
    """Check the fields of a ``config.json`` that say how large the model is, and of which kind."""
    config = read_object(path)
    if "model_type" not in config:
        raise CheckpointError(f"{path}: model_type: found nothing, allowed: a type of model")
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            _check(path, section, _CONFIG)
    hidden_size, num_heads = config.get("hidden_size"), config.get("num_attention_heads")
    if hidden_size and num_heads and not config.get("head_dim") and hidden_size % num_heads:
        refuse(path, "hidden_size", hidden_size, f"a multiple of {num_heads}, the heads")
    num_shared = config.get("num_key_value_heads")
    if num_heads and num_shared and num_heads % num_shared:
        refuse(path, "num_key_value_heads", num_shared, f"a divisor of {num_heads}, the heads")


def _check_tokenizer(directory: Path) -> None:
    config = _check_fields(directory / "tokenizer_config.json", _TOKENIZER)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        read_optional_object(directory / name)
    _check_fields(directory / "added_tokens.json", {}, every=_INDEX)
    for template in (directory / "chat_template.jinja", *_named_templates(directory)):
        if template.exists() or template.is_symlink():
            read_text(template)
    _check_fields(directory / "chat_template.json", _TEMPLATE)
    whole = directory / "tokenizer.json"
    if whole.exists() or whole.is_symlink():
        _check_tokenizer_file(whole)
        return
    if "auto_map" in config or any(directory.glob(_TIKTOKEN)):
        return
    if any((directory / name).is_file() for name in _TOKENIZERS):
        return
    raise CheckpointError(
        f"{directory}: holds no tokenizer, allowed: one of {', '.join(_TOKENIZERS)}"
    )


def _check_tokenizer_file(path: Path) -> None:
    from tokenizers import Tokenizer

    read_object(path)
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise CheckpointError(f"{path}: is no tokenizer: {' '.join(str(error).split())}") from None


def _named_templates(directory: Path) -> list[Path]:
    return sorted((directory / _TEMPLATES).glob("*.jinja"))


def _check_fields(
    path: Path, checks: Mapping[str, Check], every: Check | None = None
) -> dict[str, Any]:
    """Return the content of an optional file, after checking its fields."""
    content = read_optional_object(path)
    _check(path, content, checks if every is None else dict.fromkeys(content, every))
    return content


def _check(path: Path, content: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    for name, (is_allowed, allowed) in checks.items():
        value = content.get(name)
        if value is not None and not is_allowed(value):
            refuse(path, name, value, allowed)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # NaN is equal to nothing, not even to itself.
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and isinstance(value.get("content"), str)
    )


def _is_template(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and isinstance(item.get("name"), str)
        and isinstance(item.get("template"), str)
        for item in value
    )


def _are_strings(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _is_token_list(value: Any) -> bool:
    return _is_index(value) or (isinstance(value, list) and all(map(_is_index, value)))


def _is_index(value: Any) -> bool:
    return _is_integer(value) and 0 <= value <= _MAX_INT


def _are_added_tokens(value: Any) -> bool:
    return isinstance(value, dict) and all(
        index.isdecimal() and _is_token(token) for index, token in value.items()
    )


_COUNT: Check = (lambda value: _is_integer(value) and value >= 1, "an integer, 1 or more")
_INDEX: Check = (_is_index, "an integer, 0 or more")
_TOKENS: Check = (_is_token_list, "the number of a token, or a list of such")
_BOOLEAN: Check = (lambda value: isinstance(value, bool), "true or false")
_STRING: Check = (lambda value: isinstance(value, str), "a string")
_OBJECT: Check = (lambda value: isinstance(value, dict), "an object")
_NUMBER: Check = (_is_number, "a number")
_POSITIVE: Check = (
    lambda value: _is_number(value) and 0 < value < math.inf,
    "a number above 0",
)
_SHARE: Check = (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
_TOKEN: Check = (_is_token, 'a string, or an object with a string "content"')

_CONFIG: dict[str, Check] = {
    "architectures": (
        lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "a list of names",
    ),
    "model_type": _STRING,
    "head_dim": _COUNT,
    "hidden_size": _COUNT,
    "intermediate_size": _COUNT,
    "max_position_embeddings": _COUNT,
    "num_attention_heads": _COUNT,
    "num_hidden_layers": _COUNT,
    "num_key_value_heads": _COUNT,
    "vocab_size": _COUNT,
    "bos_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "rms_norm_eps": _NUMBER,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    "rope_theta": _POSITIVE,
    "text_config": _OBJECT,
    "tie_word_embeddings": _BOOLEAN,
    "torch_dtype": _STRING,
    "dtype": _STRING,
}
_GENERATION: dict[str, Check] = {
    "bos_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "do_sample": _BOOLEAN,
    "max_length": _COUNT,
    "max_new_tokens": _COUNT,
    "min_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "min_new_tokens": _INDEX,
    "stop_strings": (_are_strings, "a string, or a list of such"),
    "temperature": (lambda value: _is_number(value) and 0 <= value <= 2, "a number from 0 to 2"),
    "top_k": (
        lambda value: _is_integer(value) and -1 <= value <= _MAX_INT,
        f"an integer from -1 to {_MAX_INT}",
    ),
    "top_p": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, at most 1"),
}
_TOKENIZER: dict[str, Check] = {
    "added_tokens_decoder": (
        _are_added_tokens,
        'an object of numbers and objects with a string "content"',
    ),
    "bos_token": _TOKEN,
    "chat_template": (_is_template, "a string, or a list of objects with name and template"),
    "cls_token": _TOKEN,
    "eos_token": _TOKEN,
    "model_max_length": _NUMBER,
    "pad_token": _TOKEN,
    "sep_token": _TOKEN,
    "tokenizer_class": _STRING,
    "unk_token": _TOKEN,
}
_TEMPLATE: dict[str, Check] = {"chat_template": (_is_template, "a string")}
