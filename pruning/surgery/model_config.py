"""The model's configuration, adapted to the layers that stay."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from pruning.checkpoint import CheckpointError
from pruning.surgery.errors import SurgeryError
from pruning.surgery.layer_map import LayerMap

Config = dict[str, Any]

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Parts of the configuration that describe the text model, if the model reads more than text.
_TEXT_SECTIONS = ("text_config", "llm_config", "language_config")
# A list as long as the model has layers is taken for one value per layer where its name has one
# of these words.
_PER_LAYER_WORDS = frozenset(
    {"layer", "layers", "block", "blocks", "attn", "attention", "mlp", "ffn", "intermediate"}
    | {"heads", "experts", "window", "windows", "moe", "mixer", "sparsity", "hybrid"}
)
_NEVER_PER_LAYER = frozenset({"mlp_multipliers", "ssm_multipliers"})
_INDEX_LISTS = frozenset(
    {
        "attn_layer_indices",
        "cross_attention_layers",
        "full_attn_idxs",
        "hybrid_layer_ids",
        "mlp_only_layers",
        "moe_layers",
    }
)
# Fields with a number n: the first n layers are of one kind, all others of another.
_FIRST_LAYERS = frozenset(
    {"first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers"}
)
_LAST_INDEX = frozenset({"moe_layer_end_index"})
# Fields with a number n: every n-th layer is of another kind, and no list can replace the field.
_PERIODS = ("attn_layer_period", "expert_layer_period", "moe_layer_freq", "moe_layer_interval")
# transformers derives these fields from others, so they are not part of the file.
_DERIVED = ("layer_types", "layers_block_type", "layers_num_experts")
_INSEPARABLE = {
    "is_encoder_decoder": "an encoder's layers would have to be told from a decoder's",
    "num_kv_shared_layers": "layers use the keys and values of others",
    "cla_share_factor": "layers use the keys and values of others",
    "num_mem_blocks": "layers share weights",
    "vocab_size_per_layer_input": "an embedding has a part for each layer",
    "hidden_size_per_layer_input": "an embedding has a part for each layer",
    "scale_attn_by_inverse_layer_idx": "attention depends on the number of the layer",
}


def num_layers_of(config: Config) -> int:
    """Return the number of layers; raises :class:`CheckpointError` if the file has none."""
    for section in _sections(config):
        for name in _COUNTS:
            if name in section:
                count = section[name]
                if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                    raise CheckpointError(
                        f"config.json: {name}: found {count!r}, allowed: 1 or more"
                    )
                return count
    raise CheckpointError(f"config.json: none of {', '.join(_COUNTS)} is there")


def embeddings_are_tied(config: Config) -> bool:
    """Return whether the output uses the embeddings of the input."""
    for sections in ([*_sections(config), config], _views(config)):
        for section in sections:
            if isinstance(tied := section.get("tie_word_embeddings"), bool):
                return tied
    return False


def cut_config(config: Config, layers: LayerMap) -> Config:
    """Return ``config`` for the layers that stay.

    By a rule of the architecture, the kind of a layer may depend on its number. If the new
    numbers would change a layer's kind, the rule is replaced by a list of the kinds that
    transformers derives from it for ``config``. Raises :class:`SurgeryError` for a model whose
    layers cannot be described like that.
    """
    if not layers.removed:
        return copy.deepcopy(config)
    for facts in [config, *(_views(config) or _sections(config))]:
        _check_inseparable(facts, layers)
    config = _with_explicit_sparse_layers(config)
    result = copy.deepcopy(config)
    for section in _sections(result):
        _cut_section(section, layers)
    if before := _views(config):
        _keep_kinds(result, before, layers)
    return result


def _sections(config: Config) -> list[Config]:
    """Return the parts of the configuration that describe the layers, the outermost first."""
    nested = (config.get(name) for name in _TEXT_SECTIONS)
    candidates = [config, *(section for section in nested if isinstance(section, dict))]
    described = [s for s in candidates if any(name in s for name in _COUNTS)]
    return described or [config]


def _cut_section(section: Config, layers: LayerMap) -> None:
    for name, value in list(section.items()):
        match value:
            case bool():
                continue
            case int() if name in _COUNTS and value == layers.num_layers:
                section[name] = layers.depth
            case int() if name in _FIRST_LAYERS:
                section[name] = layers.num_kept_below(min(value, layers.num_layers))
            case int() if name in _LAST_INDEX and 0 <= value < layers.num_layers:
                section[name] = layers.num_kept_below(value + 1) - 1
            case str() if name == "hybrid_override_pattern" and len(value) == layers.num_layers:
                section[name] = "".join(layers.cut(value))
            case list():
                section[name] = _cut_list(name, value, layers)
    _cut_attention_types(section, layers)


def _cut_list(name: str, values: list[Any], layers: LayerMap) -> list[Any]:
    if name in _INDEX_LISTS and all(type(value) is int for value in values):
        return layers.renumber(values)
    return layers.cut(values) if _is_per_layer(name, values, layers.num_layers) else values


def _is_per_layer(name: str, values: list[Any], num_layers: int) -> bool:
    return (
        len(values) == num_layers
        and not _PER_LAYER_WORDS.isdisjoint(name.split("_"))
        and name not in _NEVER_PER_LAYER
        and not name.startswith("mtp_")
    )


def _cut_attention_types(section: Config, layers: LayerMap) -> None:
    """Cut GPT-Neo's list of patterns, each with how often it is repeated."""
    match section.get("attention_types"):
        case [[list(), int()], *_] as patterns:
            kinds = [kind for pattern, repeats in patterns for kind in pattern * repeats]
            if len(kinds) == layers.num_layers:
                section["attention_types"] = [[[kind], 1] for kind in layers.cut(kinds)]


def _with_explicit_sparse_layers(config: Config) -> Config:
    """Replace Qwen's rule that every n-th layer has experts by a list of those without."""
    result = copy.deepcopy(config)
    for section, facts in zip(_sections(result), _views(config) or _sections(config), strict=True):
        step = facts.get("decoder_sparse_step")
        if not isinstance(step, int) or step == 1:
            continue
        dense = set(facts.get("mlp_only_layers") or [])
        dense |= {i for i in range(num_layers_of(section)) if step < 1 or (i + 1) % step}
        section["decoder_sparse_step"] = 1
        section["mlp_only_layers"] = sorted(dense)
    return result


def _check_inseparable(section: Config, layers: LayerMap) -> None:
    for name, reason in _INSEPARABLE.items():
        if (value := section.get(name)) and not (name == "cla_share_factor" and value == 1):
            raise SurgeryError(
                f"config.json: {name}: found {value!r}, which keeps layers from being removed: "
                f"{reason}"
            )
    for name in _PERIODS:
        period = section.get(name)
        if not isinstance(period, int) or period < 2:
            continue
        if any(new % period != old % period for new, old in enumerate(layers.kept)):
            raise SurgeryError(
                f"config.json: {name}: found {period}, allowed for removing these layers: 1 "
                "(what a layer is like follows from its number)"
            )


def _keep_kinds(result: Config, before: list[Config], layers: LayerMap) -> None:
    """Make every per-layer list of ``result`` equal to that of ``before``, cut.

    Changes ``result`` where transformers would derive another list from it.
    """
    for attempt in (1, 2):
        wrong = list(_wrong_lists(before, _views(result), layers))
        if not wrong:
            return
        for position, name, expected in wrong:
            section = _sections(result)[position]
            if attempt == 2:
                raise SurgeryError(
                    f"config.json: {name}: the layers that stay would be of other kinds; this "
                    "architecture has no way to say that they are "
                    f"{json.dumps(expected)}"
                )
            section[name] = expected


def _wrong_lists(
    before: list[Config], after: list[Config], layers: LayerMap
) -> Iterator[tuple[int, str, list[Any]]]:
    for position, (old, new) in enumerate(zip(before, after, strict=True)):
        for name, values in old.items():
            if not isinstance(values, list):
                continue
            expected = _cut_list(name, values, layers)
            if expected is not values and new.get(name) != expected:
                yield position, name, expected


def _with_special_floats(value: Any) -> Any:
    """Return a copy in which ``{"__float__": "Infinity"}`` is replaced by infinity.

    transformers writes it like that, because JSON has no such number.
    """
    match value:
        case {"__float__": "Infinity" | "-Infinity" | "NaN" as name} if len(value) == 1:
            return float(name)
        case dict():
            return {key: _with_special_floats(item) for key, item in value.items()}
        case list():
            return [_with_special_floats(item) for item in value]
    return value


def _views(config: Config) -> list[Config]:
    """Return each section as transformers reads it, with defaults and derived lists.

    Empty for a type of model that transformers has no class for. Runs no code of the model.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return []
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return []
    try:
        whole = CONFIG_MAPPING[model_type].from_dict(_with_special_floats(config))
    except Exception as error:  # its checks raise exceptions of any class
        raise SurgeryError(f"config.json: transformers refuses it: {error}") from error
    views = []
    for section in _sections(config):
        nested = [name for name in _TEXT_SECTIONS if config.get(name) is section]
        view = getattr(whole, nested[0]) if nested else whole
        derived = {name: getattr(view, name, None) for name in _DERIVED}
        views.append({**view.to_dict(), **{k: v for k, v in derived.items() if v is not None}})
    return views
