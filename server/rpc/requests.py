"""Conversion of request messages to domain objects; pure functions.

All raise :class:`InvalidArgument`, naming the field by its path in the request, such as
``sampling.temperature``. Limits of the model (context, vocabulary, number of layers) are checked by
the service.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sized

from google.protobuf.message import Message

from server.calls.generation import (
    ChatPrompt,
    Generation,
    Prompt,
    Scoring,
    TextPrompt,
    TokenPrompt,
)
from server.depth.auto_rules import AutoRules
from server.depth.depth_choice import Auto, DepthChoice, Layers, NamedLevel, PruneRatio
from server.depth.levels import LevelSpec
from server.engine.base import SamplingOptions, Structure, StructureKind
from server.errors import InvalidArgument
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from server.serving.completions import MAX_COMPLETIONS

# Every token of a request is compared with all its stop strings, on the engine's thread.
_MAX_STOPS, _MAX_STOP_CHARACTERS = 16, 256
_MAX_STOP_TOKENS = 128
_MAX_CHAT_MESSAGES, _MAX_ROLE_CHARACTERS = 1024, 64
_MAX_LEVELS = 64
_MAX_BIASES, _MAX_BIAS = 1024, 100.0
_MAX_BAD_WORDS, _MAX_BAD_WORD_CHARACTERS = 128, 256

_MAX_SEED = 2**63 - 1
_MAX_TEMPERATURE = 2.0  # as in OpenAI's API; vLLM refuses what is above


def generation(request: inference_pb2.GenerateRequest) -> Generation:
    """Return what a ``GenerateRequest`` asks for."""
    return Generation(
        request_id=request.request_id,
        prompt=_prompt(request),
        depth=depth_choice(request.depth, "depth"),
        prefill_depth=depth_choice(request.prefill_depth, "prefill_depth"),
        sampling=_sampling(request),
        echo=request.output.echo,
    )


def num_completions(request: inference_pb2.GenerateRequest) -> int:
    if request.n > MAX_COMPLETIONS:
        raise InvalidArgument("n", request.n, f"at most {MAX_COMPLETIONS}")
    return max(request.n, 1)


def scoring(request: inference_pb2.ScoreRequest) -> Scoring:
    context: TextPrompt | TokenPrompt | None = None
    match request.WhichOneof("context"):
        case "context_text":
            context = TextPrompt(request.context_text)
        case "context_ids":
            context = TokenPrompt(tuple(request.context_ids.ids))
    continuation: TextPrompt | TokenPrompt
    match request.WhichOneof("input"):
        case "text":
            continuation = TextPrompt(request.text)
        case "token_ids":
            continuation = TokenPrompt(tuple(request.token_ids.ids))
        case _:
            raise InvalidArgument("input", None, "one of text, token_ids")
    return Scoring(
        request_id=request.request_id,
        continuation=continuation,
        context=context,
        depth=depth_choice(request.depth, "depth"),
        prefill_depth=depth_choice(request.prefill_depth, "prefill_depth"),
    )


def text_to_tokenize(request: inference_pb2.TokenizeRequest) -> Prompt:
    match request.WhichOneof("input"):
        case "text":
            return TextPrompt(request.text)
        case "chat":
            return _chat(request.chat)
        case _:
            raise InvalidArgument("input", None, "one of text, chat")


def depth_choice(depth: common_pb2.Depth, field: str) -> DepthChoice:
    """Return the choice of a ``Depth``, None if the message is absent or empty."""
    match depth.WhichOneof("choice"):
        case "layers":
            return Layers(depth.layers)
        case "prune_ratio":
            return PruneRatio(depth.prune_ratio)
        case "level":
            return NamedLevel(depth.level)
        case "auto":
            loss = _number(depth.auto, "max_quality_loss", f"{field}.auto", 0.0)
            return Auto(loss)
        case _:
            return None


def level_specs(request: control_pb2.SetLevelsRequest) -> list[LevelSpec]:
    _check_count(request.levels, "levels", _MAX_LEVELS)
    return [_level_spec(spec, f"levels[{i}]") for i, spec in enumerate(request.levels)]


def _level_spec(spec: control_pb2.LevelSpec, field: str) -> LevelSpec:
    depth = _fixed_depth(spec.depth, f"{field}.depth")
    quality, writing = (
        _number(spec, name, field, 0.0) for name in ("max_quality_loss", "max_writing_loss")
    )
    choosing = _number(spec, "max_choosing_loss", field, 0.0, 1.0)
    if depth is None and quality is writing is choosing is None:
        allowed = (
            "layers or prune_ratio, unless there is a max_quality_loss, a max_writing_loss or a "
            "max_choosing_loss"
        )
        raise InvalidArgument(f"{field}.depth", None, allowed)
    prefill_depth = _fixed_depth(spec.prefill_depth, f"{field}.prefill_depth")
    return LevelSpec(
        spec.name,
        depth,
        prefill_depth,
        quality,
        spec.prompt_only,
        max_writing_loss=writing,
        max_choosing_loss=choosing,
    )


def auto_rules(policy: control_pb2.Policy, present: AutoRules) -> tuple[str | None, AutoRules]:
    """Return the level without load, None if ``policy`` has none, and ``present`` as changed."""
    level = policy.level if policy.HasField("level") else None
    levels = tuple(policy.ladder)
    if levels and level not in (None, levels[0]):
        raise InvalidArgument("policy.level", level, f"{levels[0]}, the first of policy.ladder")
    if not levels and level is None:
        levels = present.levels

    def seconds(name: str) -> float | None:
        return _number(policy, name, "policy", 0.0, above_low=True)

    numbers = {
        name: value
        for name, value in (
            ("time_to_first_token", seconds("time_to_first_token_seconds")),
            ("inter_token_latency", seconds("inter_token_latency_seconds")),
            ("hold_seconds", _number(policy, "hold_seconds", "policy", 0.0)),
            ("max_quality_loss", _number(policy, "max_quality_loss", "policy", 0.0)),
            ("min_agreement", _number(policy, "min_agreement", "policy", 0.0, 1.0)),
            ("max_writing_loss", _limit(policy, "max_writing_loss", "policy")),
            ("max_repetition", _number(policy, "max_repetition", "policy", 0.0, 1.0)),
            ("max_choosing_loss", _number(policy, "max_choosing_loss", "policy", 0.0, 1.0)),
        )
        if value is not None
    }
    by_default = policy.by_default if policy.HasField("by_default") else present.by_default
    return level, dataclasses.replace(present, levels=levels, by_default=by_default, **numbers)


def grace_seconds(request: control_pb2.DrainRequest) -> float | None:
    return _number(request, "grace_seconds", "", 0.0)


def _prompt(request: inference_pb2.GenerateRequest) -> Prompt:
    match request.WhichOneof("input"):
        case "prompt":
            return TextPrompt(request.prompt)
        case "token_ids":
            return TokenPrompt(tuple(request.token_ids.ids))
        case "chat":
            return _chat(request.chat)
        case _:
            raise InvalidArgument("input", None, "one of prompt, token_ids, chat")


def _chat(chat: inference_pb2.Chat) -> ChatPrompt:
    if not chat.messages:
        raise InvalidArgument("chat.messages", [], "at least one message")
    _check_count(chat.messages, "chat.messages", _MAX_CHAT_MESSAGES)
    for i, message in enumerate(chat.messages):
        if not 1 <= len(message.role) <= _MAX_ROLE_CHARACTERS:
            allowed = f"a role, such as user, of at most {_MAX_ROLE_CHARACTERS} characters"
            raise InvalidArgument(f"chat.messages[{i}].role", message.role, allowed)
    return ChatPrompt(
        tuple({"role": message.role, "content": message.content} for message in chat.messages)
    )


def _sampling(request: inference_pb2.GenerateRequest) -> SamplingOptions:
    sampling, stop, output = request.sampling, request.stop, request.output
    _check_count(stop.stop, "stop.stop", _MAX_STOPS)
    _check_count(stop.stop_token_ids, "stop.stop_token_ids", _MAX_STOP_TOKENS)
    for i, string in enumerate(stop.stop):
        if not 1 <= len(string) <= _MAX_STOP_CHARACTERS:
            allowed = f"1 to {_MAX_STOP_CHARACTERS} characters"
            raise InvalidArgument(f"stop.stop[{i}]", string, allowed)
    min_tokens = stop.min_tokens if stop.HasField("min_tokens") else None
    max_tokens = stop.max_tokens if stop.HasField("max_tokens") else None
    if max_tokens == 0:
        raise InvalidArgument("stop.max_tokens", max_tokens, "1 or more")
    if sampling.HasField("seed") and sampling.seed < 0:
        raise InvalidArgument("sampling.seed", sampling.seed, f"0 to {_MAX_SEED}")
    return SamplingOptions(
        temperature=_number(sampling, "temperature", "sampling", 0.0, _MAX_TEMPERATURE),
        top_p=_number(sampling, "top_p", "sampling", 0.0, 1.0, above_low=True),
        top_k=sampling.top_k if sampling.HasField("top_k") else None,
        min_p=_number(sampling, "min_p", "sampling", 0.0, 1.0),
        presence_penalty=_number(sampling, "presence_penalty", "sampling", -2.0, 2.0),
        frequency_penalty=_number(sampling, "frequency_penalty", "sampling", -2.0, 2.0),
        repetition_penalty=_number(sampling, "repetition_penalty", "sampling", 0.0, above_low=True),
        seed=sampling.seed if sampling.HasField("seed") else None,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=tuple(stop.stop),
        stop_token_ids=tuple(stop.stop_token_ids),
        ignore_eos=stop.ignore_eos,
        include_stop=stop.include_stop,
        logprobs=output.logprobs if output.HasField("logprobs") else None,
        logit_bias=_logit_bias(sampling),
        bad_words=_bad_words(sampling),
        allowed_token_ids=(
            tuple(sampling.allowed_token_ids.ids)
            if sampling.HasField("allowed_token_ids")
            else None
        ),
        show_special_tokens=request.show_special_tokens,
        structure=_structure(request.structure),
    )


def _logit_bias(sampling: inference_pb2.SamplingParams) -> dict[int, float] | None:
    _check_count(sampling.logit_bias, "sampling.logit_bias", _MAX_BIASES)
    for token_id, bias in sampling.logit_bias.items():
        if not -_MAX_BIAS <= bias <= _MAX_BIAS:
            allowed = f"{-_MAX_BIAS:g} to {_MAX_BIAS:g}"
            raise InvalidArgument(f"sampling.logit_bias[{token_id}]", bias, allowed)
    return dict(sampling.logit_bias) or None


def _bad_words(sampling: inference_pb2.SamplingParams) -> tuple[str, ...]:
    _check_count(sampling.bad_words, "sampling.bad_words", _MAX_BAD_WORDS)
    for i, word in enumerate(sampling.bad_words):
        if not 1 <= len(word) <= _MAX_BAD_WORD_CHARACTERS:
            allowed = f"1 to {_MAX_BAD_WORD_CHARACTERS} characters"
            raise InvalidArgument(f"sampling.bad_words[{i}]", word, allowed)
    return tuple(sampling.bad_words)


def _structure(structure: inference_pb2.Structure) -> Structure | None:
    match structure.WhichOneof("form"):
        case "json_schema":
            return Structure(StructureKind.JSON_SCHEMA, structure.json_schema)
        case "regex":
            return Structure(StructureKind.REGEX, structure.regex)
        case "grammar":
            return Structure(StructureKind.GRAMMAR, structure.grammar)
        case "choices":
            return Structure(StructureKind.CHOICE, tuple(structure.choices.texts))
        case "json_object":
            return Structure(StructureKind.JSON_OBJECT)
        case _:
            return None


def _check_count(values: Sized, field: str, most: int) -> None:
    if len(values) > most:
        raise InvalidArgument(field, f"{len(values)} entries", f"at most {most}")


def _number(
    message: Message,
    name: str,
    path: str,
    low: float,
    high: float = math.inf,
    *,
    above_low: bool = False,
) -> float | None:
    """Return an optional double, which must be finite and within the bounds."""
    if not message.HasField(name):
        return None
    value: float = getattr(message, name)
    if math.isfinite(value) and low <= value <= high and not (above_low and value == low):
        return value
    field = f"{path}.{name}" if path else name
    if high == math.inf:
        allowed = f"more than {low:g}" if above_low else f"{low:g} or more"
    else:
        allowed = f"more than {low:g}, up to {high:g}" if above_low else f"{low:g} to {high:g}"
    raise InvalidArgument(field, value, allowed)


def _limit(message: Message, name: str, path: str) -> float | None:
    """Return an optional double that must not be negative, and may be infinite."""
    if message.HasField(name) and getattr(message, name) == math.inf:
        return math.inf
    return _number(message, name, path, 0.0)


def _fixed_depth(depth: common_pb2.Depth, field: str) -> int | float | None:
    match depth_choice(depth, field):
        case None:
            return None
        case Layers(num_layers):
            return num_layers
        case PruneRatio(ratio):
            return ratio
        case _:
            raise InvalidArgument(field, depth.WhichOneof("choice"), "layers or prune_ratio")
