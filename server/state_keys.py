"""Keys of the entries in the state directory.

An entry is found again only under an equal key. So everything that an entry depends on is part of
its key, or is compared when the entry is read:

| entry | what it is | what it depends on |
|---|---|---|
| ``hash-*`` | SHA-256 of one file | path, size, times and inode of the file |
| ``plan-*`` | ranking of the layers | model, tokenizer, calibration text and number of tokens, metric, data type, context, vLLM's arguments, the depths of levels if it may end early; one by a search also on the tokens that it may run and on repair, the better one of two also on the held-out text and the levels; one that transformers has measured does not depend on vLLM's arguments |
| ``own-text-*`` | text that the model has written | model, tokenizer, number of tokens, length of a document, seed |
| ``search-*`` | divergence from the dense model, by the layers that are left out | model, tokenizer, token ids of the text, repair maps, data type, context, vLLM's arguments |
| ``quality-*`` | perplexity and the like, by the layers that are left out | as a plan, with the held-out text |
| ``probes-*`` | how depths write and choose, by the layers that are left out | as quality |
| ``repair-*`` | maps that stand in for skipped layers | as a plan; it is compared with its digest |
| ``healed-*`` | maps or gated MLPs trained for one set of skipped layers | model, skipped layers, which of the two; the latest training replaces an earlier one |
| ``healing-*`` | state of an unfinished training of these, or what it came to | model, skipped layers, what is trained, intermediate size of MLPs, token ids to train and to judge on, the closed-form maps that it began with or is compared with, data type, steps, seed |
| ``speed-*`` | tokens per second, by the layers that are left out | as quality, and hardware, versions of packages, requests at a time |
| ``quantized-*`` | quantized checkpoint, and a record of its files | model, how it is quantized, token ids that it is calibrated on, version of GPTQModel, companion files, whether code is copied; each file is compared with its record |
| ``checkpoint-*`` | checkpoint of one depth | model, removed layers, companion files, whether code is copied; it is compared with its fingerprint |
| ``compiled/`` | code of compiled layers | torch keeps it under keys of its own: source, versions, options, processor |

*Model* is the fingerprint of all weights and the configuration (:mod:`pruning.fingerprint`),
*tokenizer* the fingerprint of all files that decide which tokens a text has. *Companion files* are
those beside the weights and the configuration: tokenizer, templates, generation settings, model
card, code.

A key also holds a method number, which goes up when Fathom changes the way in which it makes
entries of that kind. Versions of packages are part of the key only where they change the
result by more than rounding does.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Key = dict[str, object]

_HASH, _PLAN, _SEARCH, _QUALITY, _PROBES, _REPAIR, _SPEED, _QUANTIZED, _CHECKPOINT = (
    {"method": method} for method in (1, 2, 1, 2, 2, 1, 1, 3, 1)
)
_HEALED = {"method": 1}
_OWN_TEXT = {"method": 1}
_MAPS = "maps"


@dataclass(frozen=True, slots=True)
class Measuring:
    """The part of a key that all measurements with an engine have in common.

    ``model`` and ``tokenizer`` are fingerprints. ``engine`` is elastic or dedicated: the two run
    the model at different speeds, and measure its quality in different ways.
    """

    model: str
    tokenizer: str
    engine: str
    dtype: str
    max_context: int
    engine_args: Mapping[str, Any] = field(default_factory=dict)


def plan_key(
    measuring: Measuring,
    *,
    text: str,
    num_tokens: int,
    metric: str,
    search_tokens: int,
    repair: str,
    compared_on: Mapping[str, object] | None = None,
    settled_at: Sequence[Sequence[int]] | None = None,
) -> Key:
    """Return the key of a plan that an engine has measured; ``text`` is a fingerprint.

    ``search_tokens`` is 0, and ``repair`` is none, for a metric that does not search.
    ``compared_on`` is the held-out text and the levels on which orders are compared; None for
    a metric that is not the better one of several. ``settled_at`` are the depths at which the order
    had to be settled for the measurement to end early; None: it never did.
    """
    compared: Key = {} if compared_on is None else {"compared_on": compared_on}
    if settled_at is not None:
        compared["settled_at"] = settled_at
    return {
        **_PLAN,
        **compared,
        **asdict(measuring),
        "text": text,
        "num_tokens": num_tokens,
        "metric": metric,
        "search_tokens": search_tokens,
        "repair": repair,
    }


def own_text_key(*, model: str, tokenizer: str, num_tokens: int, length: int, seed: int) -> Key:
    """Return the key of text that a model has written."""
    return {
        **_OWN_TEXT,
        "model": model,
        "tokenizer": tokenizer,
        "num_tokens": num_tokens,
        "length": length,
        "seed": seed,
    }


def search_key(measuring: Measuring, *, tokens: str, repair: str) -> Key:
    """Return the key of what searches have found.

    ``tokens`` is the fingerprint of the token ids that layers were compared on, ``repair`` that
    of the maps that stood in for skipped layers; empty: nothing did.
    """
    return {**_SEARCH, **asdict(measuring), "tokens": tokens, "repair": repair}


def transformers_plan_key(
    *,
    model: str,
    tokenizer: str,
    dtype: str,
    max_context: int,
    text: str,
    num_tokens: int,
    metric: str,
) -> Key:
    """Return the key of a plan that transformers has measured."""
    return {
        **_PLAN,
        "library": "transformers",
        "model": model,
        "tokenizer": tokenizer,
        "dtype": dtype,
        "max_context": max_context,
        "text": text,
        "num_tokens": num_tokens,
        "metric": metric,
    }


def quality_key(measuring: Measuring, *, text: str, num_tokens: int) -> Key:
    """Return the key of qualities; ``text`` is the fingerprint of the held-out text."""
    return {**_QUALITY, **asdict(measuring), "text": text, "num_tokens": num_tokens}


def probes_key(measuring: Measuring, *, text: str, num_tokens: int) -> Key:
    """Return the key of probes, which are made of the held-out text.

    Their method number is the version of their design (:mod:`server.calibration.probes`).
    """
    return {**_PROBES, **asdict(measuring), "text": text, "num_tokens": num_tokens}


def repair_key(measuring: Measuring, *, text: str, num_tokens: int) -> Key:
    """Return the key of repair maps; ``text`` is the fingerprint of the calibration text."""
    return {**_REPAIR, **asdict(measuring), "text": text, "num_tokens": num_tokens}


def healed_key(model: str, skipped: Sequence[int], kind: str = _MAPS) -> Key:
    """Return the key of what was trained for the layers ``skipped``, maps or gated MLPs."""
    key: Key = {**_HEALED, "model": model, "skipped": list(skipped)}
    # Maps have the key that they had before there were MLPs.
    return key if kind == _MAPS else {**key, "kind": kind}


def healing_key(model: str, skipped: Sequence[int], training: Any) -> Key:
    """Return the key of one training; ``training`` is a dataclass of all that it depends on."""
    fields = asdict(training)
    kind, intermediate_size = fields.pop("kind"), fields.pop("intermediate_size")
    key = {**healed_key(model, skipped, kind), **fields}
    return key if kind == _MAPS else {**key, "intermediate_size": intermediate_size}


def transformers_repair_key(
    *, model: str, tokenizer: str, dtype: str, max_context: int, text: str, num_tokens: int
) -> Key:
    """Return the key of repair maps that were fitted with transformers."""
    return {
        **_REPAIR,
        "library": "transformers",
        "model": model,
        "tokenizer": tokenizer,
        "dtype": dtype,
        "max_context": max_context,
        "text": text,
        "num_tokens": num_tokens,
    }


def speed_key(
    measuring: Measuring,
    *,
    text: str,
    num_tokens: int,
    hardware: Mapping[str, object],
    versions: Mapping[str, str],
    max_num_seqs: int,
) -> Key:
    """Return the key of speeds; prompts come from the held-out text."""
    return {
        **_SPEED,
        **asdict(measuring),
        "text": text,
        "num_tokens": num_tokens,
        "hardware": hardware,
        "versions": versions,
        "max_num_seqs": max_num_seqs,
    }


def quantized_key(
    *,
    model: str,
    bits: int,
    group_size: int | None,
    act_order: bool,
    tokens: str,
    gptqmodel: str,
    with_code: bool,
) -> Key:
    """Return the key of quantized weights.

    ``model`` is the fingerprint before quantization. ``tokens`` is the fingerprint of the token
    ids to calibrate on; text and tokenizer have no other influence on the weights.
    """
    return {
        **_QUANTIZED,
        "model": model,
        "bits": bits,
        "group_size": group_size,
        "act_order": act_order,
        "tokens": tokens,
        "gptqmodel": gptqmodel,
        # The configuration names the model's own code only where that may run.
        "with_code": with_code,
    }


def with_companions(key: Key, companions: str) -> Key:
    """Return the key of a checkpoint: of its weights, and the files beside them."""
    return {**key, "companions": companions}


def checkpoint_key(*, model: str, removed: Sequence[int], companions: str, with_code: bool) -> Key:
    """Return the key of a checkpoint of one depth."""
    return with_companions(
        {**_CHECKPOINT, "model": model, "removed": list(removed), "with_code": with_code},
        companions,
    )


def hash_key(path: Path) -> Key:
    """Return the key of the hash of a file; the file's status is kept beside the hash."""
    return {**_HASH, "path": str(path.resolve())}
