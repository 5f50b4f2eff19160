"""Between messages and what the service works with; pure functions.

Errors name fields by their path in the request, as ``sampling.temperature``. What only the
model can decide (context, vocabulary, number of layers) is left to the service.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sized

from google.protobuf.message import Message

from pruning.plan import Plan
from pruning.quality import Quality
from server.auto_rules import AutoRules, ladder
from server.calibration import Progress
from server.engine.base import (
    FinishReason,
    GenerationDelta,
    ModelInfo,
    SamplingOptions,
    TokenScore,
)
from server.errors import InvalidArgument
from server.generation import (
    ChatPrompt,
    FinishInfo,
    Generation,
    Prompt,
    PromptInfo,
    Scoring,
    ScoringResult,
    TextPrompt,
    TokenPrompt,
)
from server.levels import DepthPair, Level, LevelSpec
from server.life import State, Status
from server.policy import (
    Auto,
    DepthChoice,
    DepthPolicy,
    Layers,
    NamedLevel,
    PruneRatio,
    Reason,
    ServedDepth,
    Speed,
)
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2

_REASONS = {
    Reason.REQUESTED: common_pb2.Served.REASON_REQUESTED,
    Reason.DEFAULT: common_pb2.Served.REASON_DEFAULT,
    Reason.AUTO: common_pb2.Served.REASON_AUTO,
    Reason.DEGRADED: common_pb2.Served.REASON_DEGRADED,
}

_FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FinishInfo.REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FinishInfo.REASON_LENGTH,
}

_STATES = {
    State.STARTING: control_pb2.GetStatusResponse.STATE_STARTING,
    State.SERVING: control_pb2.GetStatusResponse.STATE_SERVING,
    State.DRAINING: control_pb2.GetStatusResponse.STATE_DRAINING,
    State.ENGINE_DOWN: control_pb2.GetStatusResponse.STATE_ENGINE_DOWN,
}

# Every token of a request is compared with all of its stop strings, on the engine's thread.
_MAX_STOPS, _MAX_STOP_CHARACTERS = 16, 256
_MAX_STOP_TOKENS = 128
_MAX_CHAT_MESSAGES, _MAX_ROLE_CHARACTERS = 1024, 64
_MAX_LEVELS = 64

# Of a seed, which is a signed 64-bit integer in the request.
_MAX_INT64 = 2**63 - 1


def generation(request: inference_pb2.GenerateRequest) -> Generation:
    """Raise :class:`InvalidArgument`, as all functions that read requests do."""
    return Generation(
        request_id=request.request_id,
        prompt=_prompt(request),
        depth=depth_choice(request.depth, "depth"),
        prefill_depth=depth_choice(request.prefill_depth, "prefill_depth"),
        sampling=_sampling(request),
        echo=request.output.echo,
    )


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
    """Read a ``Depth``, absent or empty for None."""
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
    if depth is None:
        raise InvalidArgument(f"{field}.depth", None, "layers or prune_ratio")
    return LevelSpec(spec.name, depth, _fixed_depth(spec.prefill_depth, f"{field}.prefill_depth"))


def auto_rules(policy: control_pb2.Policy, present: AutoRules) -> tuple[str | None, AutoRules]:
    """Return the level without load, None where it is not given, and the rules."""
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
        )
        if value is not None
    }
    by_default = policy.by_default if policy.HasField("by_default") else present.by_default
    return level, dataclasses.replace(present, levels=levels, by_default=by_default, **numbers)


def policy_message(policy: DepthPolicy, rules: AutoRules) -> control_pb2.Policy:
    return control_pb2.Policy(
        level=policy.auto_level,
        ladder=[level.name for level in ladder(policy, rules)],
        time_to_first_token_seconds=rules.time_to_first_token,
        inter_token_latency_seconds=rules.inter_token_latency,
        hold_seconds=rules.hold_seconds,
        max_quality_loss=rules.max_quality_loss,
        min_agreement=rules.min_agreement,
        by_default=rules.by_default,
    )


def grace_seconds(request: control_pb2.DrainRequest) -> float | None:
    return _number(request, "grace_seconds", "", 0.0)


def served_message(served: ServedDepth) -> common_pb2.Served:
    return common_pb2.Served(
        prefill_layers=served.prefill_layers,
        decode_layers=served.decode_layers,
        reason=_REASONS[served.reason],
    )


def prompt_info_message(info: PromptInfo) -> inference_pb2.PromptInfo:
    return inference_pb2.PromptInfo(
        request_id=info.request_id,
        num_prompt_tokens=info.num_prompt_tokens,
        served=served_message(info.served),
    )


def delta_message(delta: GenerationDelta, *, token_ids: bool) -> inference_pb2.Delta:
    return inference_pb2.Delta(
        text=delta.text,
        token_ids=delta.token_ids if token_ids else (),
        logprobs=map(logprob_message, delta.scores),
    )


def finish_info_message(info: FinishInfo) -> inference_pb2.FinishInfo:
    return inference_pb2.FinishInfo(
        reason=_FINISH_REASONS[info.reason],
        stop_string=info.stopped_by if isinstance(info.stopped_by, str) else None,
        stop_token_id=info.stopped_by if isinstance(info.stopped_by, int) else None,
        usage=inference_pb2.Usage(
            num_prompt_tokens=info.num_prompt_tokens,
            num_generated_tokens=info.num_generated_tokens,
            num_cached_tokens=info.num_cached_tokens,
        ),
        timings=inference_pb2.Timings(
            queue=info.timings.queue,
            time_to_first_token=info.timings.time_to_first_token,
            total=info.timings.total,
        ),
        served=served_message(info.served),
    )


def logprob_message(score: TokenScore) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=score.token_id,
        logprob=score.logprob,
        text=score.text,
        top=map(logprob_message, score.top),
    )


def score_message(result: ScoringResult) -> inference_pb2.ScoreResponse:
    return inference_pb2.ScoreResponse(
        logprobs=map(logprob_message, result.scores),
        total_logprob=math.fsum(score.logprob for score in result.scores),
        served=served_message(result.served),
    )


def plan_message(plan: Plan) -> common_pb2.Plan:
    return common_pb2.Plan(
        removal_order=plan.removal_order,
        layers=[
            common_pb2.LayerImportance(layer=layer, score=score, stderr=stderr)
            for layer, (score, stderr) in enumerate(zip(plan.scores, plan.stderrs, strict=True))
        ],
        metric=plan.metric,
        model_fingerprint=plan.model_fingerprint,
        text_fingerprint=plan.text_fingerprint,
        num_tokens=plan.num_tokens,
        created_at=plan.created_at,
        versions=plan.versions,
    )


def level_message(level: Level, policy: DepthPolicy) -> common_pb2.Level:
    return _measured_message(
        level.name, level.depths, policy, is_default=level.name == policy.default_level
    )


def model_message(model: ModelInfo, engine: str, policy: DepthPolicy) -> inference_pb2.Model:
    measured = sorted(
        policy.qualities.keys() | policy.speeds.keys(),
        key=lambda pair: (-pair.decode_layers, -pair.prefill_layers),
    )
    return inference_pb2.Model(
        name=model.name,
        architecture=model.architecture,
        dtype=model.dtype,
        quantization=model.quantization,
        num_layers=model.num_layers,
        vocab_size=model.vocab_size,
        max_context=model.max_context,
        engine=engine,
        levels=[level_message(level, policy) for level in policy.levels],
        depths=[
            _measured_message(_level_name(pair, policy.levels), pair, policy, is_default=False)
            for pair in measured
        ],
        plan=plan_message(policy.plan),
    )


def progress_message(progress: Progress) -> control_pb2.Progress:
    return control_pb2.Progress(phase=progress.phase, done=progress.done, total=progress.total)


def status_message(status: Status) -> control_pb2.GetStatusResponse:
    return control_pb2.GetStatusResponse(
        state=_STATES[status.state],
        num_running=status.load.num_running,
        num_waiting=status.load.num_waiting,
        uptime_seconds=status.uptime,
        startup_seconds=status.startup_seconds,
        num_engine_restarts=status.num_engine_restarts,
        version=status.version,
        startup_phase=status.startup_phase,
        auto_level=status.auto_level,
    )


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
        raise InvalidArgument("sampling.seed", sampling.seed, f"0 to {_MAX_INT64}")
    return SamplingOptions(
        temperature=_number(sampling, "temperature", "sampling", 0.0),
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
    )


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


def _fixed_depth(depth: common_pb2.Depth, field: str) -> int | float | None:
    match depth_choice(depth, field):
        case None:
            return None
        case Layers(num_layers):
            return num_layers
        case PruneRatio(ratio):
            return ratio
        case choice:
            raise InvalidArgument(field, choice, "layers or prune_ratio")


def _level_name(pair: DepthPair, levels: Iterable[Level]) -> str:
    return next((level.name for level in levels if level.depths == pair), "")


def _measured_message(
    name: str, pair: DepthPair, policy: DepthPolicy, *, is_default: bool
) -> common_pb2.Level:
    quality, speed = policy.qualities.get(pair), policy.speeds.get(pair)
    return common_pb2.Level(
        name=name,
        prefill_layers=pair.prefill_layers,
        decode_layers=pair.decode_layers,
        quality=None if quality is None else _quality_message(quality),
        speed=None if speed is None else _speed_message(speed),
        is_default=is_default,
    )


def _quality_message(quality: Quality) -> common_pb2.Quality:
    return common_pb2.Quality(
        perplexity=quality.perplexity,
        perplexity_stderr=quality.perplexity_stderr,
        agreement=quality.agreement,
        kl_nats=quality.kl_nats,
        num_tokens=quality.num_tokens,
    )


def _speed_message(speed: Speed) -> common_pb2.Speed:
    return common_pb2.Speed(
        tokens_per_second=speed.tokens_per_second,
        speedup=speed.speedup,
        num_streams=speed.num_streams,
    )
