"""Conversion of domain objects to reply messages; pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pruning.plan import Plan
from pruning.quality import Quality
from server.calibration.calibrator import Progress
from server.calls.generation import FinishInfo, PromptInfo
from server.depth.auto_rules import AutoRules, ladder
from server.depth.levels import DepthPair, Level
from server.depth.policy import DepthPolicy, Reason, ServedDepth, Speed
from server.engine.base import FinishReason, GenerationDelta, ModelInfo, TokenScore
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from server.serving.service_state import State, Status

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
        is_greedy=score.is_greedy,
    )


def score_message(scores: Iterable[TokenScore], served: ServedDepth) -> inference_pb2.ScoreResponse:
    """Return the answer without the scores of the single tokens."""
    return inference_pb2.ScoreResponse(
        total_logprob=math.fsum(score.logprob for score in scores),
        served=served_message(served),
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
        other_scores={
            name: common_pb2.LayerScores(scores=scores)
            for name, scores in plan.other_scores.items()
        },
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


def state_message(state: State) -> control_pb2.GetStatusResponse.State:
    return _STATES[state]


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
        problems=status.problems,
    )


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
