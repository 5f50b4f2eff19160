"""Conversion of domain objects to reply messages; pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pruning.plan import Plan
from pruning.probes import Choosing, Writing
from pruning.quality import Quality
from server.calibration.calibrator import Progress
from server.calls.generation import FinishInfo, PromptInfo
from server.depth.auto_rules import AutoRules, ladder
from server.depth.depth_choice import RequestKind
from server.depth.levels import DepthPair, Level
from server.depth.measured import Speed
from server.depth.policy import DepthPolicy
from server.depth.repair import RepairStatus, StandIn
from server.depth.served_depth import Reason, ServedDepth
from server.engine.base import FinishReason, GenerationDelta, ModelInfo, TokenScore
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from server.serving.service_state import State, Status

_REASONS = {
    Reason.REQUESTED: common_pb2.Served.REASON_REQUESTED,
    Reason.DEFAULT: common_pb2.Served.REASON_DEFAULT,
    Reason.AUTO: common_pb2.Served.REASON_AUTO,
    Reason.DEGRADED: common_pb2.Served.REASON_DEGRADED,
}

_STAND_INS = {
    StandIn.NONE: common_pb2.STAND_IN_NONE,
    StandIn.CLOSED_FORM: common_pb2.STAND_IN_CLOSED_FORM,
    StandIn.HEALED: common_pb2.STAND_IN_HEALED,
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
        score_ladder=[level.name for level in ladder(policy, rules, RequestKind.SCORE)],
        max_writing_loss=rules.max_writing_loss,
        max_repetition=rules.max_repetition,
        max_choosing_loss=rules.max_choosing_loss,
    )


def served_message(served: ServedDepth) -> common_pb2.Served:
    return common_pb2.Served(
        prefill_layers=served.prefill_layers,
        decode_layers=served.decode_layers,
        reason=_REASONS[served.reason],
        stand_in=_STAND_INS[served.stand_in],
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
        settled=plan.settled,
        other_scores={
            name: common_pb2.LayerScores(scores=scores)
            for name, scores in plan.other_scores.items()
        },
    )


def level_message(level: Level, policy: DepthPolicy) -> common_pb2.Level:
    message = _measured_message(
        level.name, level.depths, policy, is_default=level.name == policy.default_level
    )
    for kind, limit in level.limits.items():
        setattr(message, kind.value, limit)
    return message


def repair_message(status: RepairStatus) -> inference_pb2.Repair | None:
    repair = status.in_force
    if repair is None:
        return None
    return inference_pb2.Repair(
        kind=_STAND_INS[repair.kind],
        fingerprint=repair.fingerprint,
        num_bytes=repair.num_bytes,
        num_tokens=repair.num_tokens,
        unexplained=repair.unexplained,
        kl_nats=status.kl_nats,
        kl_nats_without=status.kl_nats_without,
    )


def model_message(
    model: ModelInfo, engine: str, policy: DepthPolicy, repair: RepairStatus
) -> inference_pb2.Model:
    levels = {level.depths for level in policy.levels}
    measured = sorted(
        # A search for a level of the prompt has measured others, which nobody has asked for.
        (
            pair
            for pair in policy.qualities.keys() | policy.speeds.keys() | policy.probes.keys()
            if pair.prefill_layers == pair.decode_layers or pair in levels
        ),
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
        repair=repair_message(repair),
    )


def progress_message(progress: Progress) -> control_pb2.Progress:
    return control_pb2.Progress(phase=progress.phase, done=progress.done, total=progress.total)


def state_message(state: State) -> control_pb2.GetStatusResponse.State:
    return _STATES[state]


def status_message(
    status: Status, policy: control_pb2.Policy | None
) -> control_pb2.GetStatusResponse:
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
        repair_wanted=_STAND_INS[status.repair.wanted],
        repair_in_force=_STAND_INS[
            StandIn.NONE if status.repair.in_force is None else status.repair.in_force.kind
        ],
        repair_problem=status.repair.problem,
        auto_score_level=status.auto_score_level,
        policy=policy,
        level_problems=status.level_problems,
        unmeasured=status.unmeasured,
    )


def _level_name(pair: DepthPair, levels: Iterable[Level]) -> str:
    return next((level.name for level in levels if level.depths == pair), "")


def _measured_message(
    name: str, pair: DepthPair, policy: DepthPolicy, *, is_default: bool
) -> common_pb2.Level:
    quality, speed = policy.qualities.get(pair), policy.speeds.get(pair)
    probes = policy.probes.get(pair)
    writing = None if probes is None else probes.writing
    choosing = None if probes is None else probes.choosing
    return common_pb2.Level(
        name=name,
        prefill_layers=pair.prefill_layers,
        decode_layers=pair.decode_layers,
        quality=None if quality is None else _quality_message(quality),
        speed=None if speed is None else _speed_message(speed),
        is_default=is_default,
        stand_in=_STAND_INS[policy.stand_in(pair)],
        writing=None if writing is None else _writing_message(writing),
        choosing=None if choosing is None else _choosing_message(choosing),
    )


def _quality_message(quality: Quality) -> common_pb2.Quality:
    return common_pb2.Quality(
        perplexity=quality.perplexity,
        perplexity_stderr=quality.perplexity_stderr,
        agreement=quality.agreement,
        kl_nats=quality.kl_nats,
        num_tokens=quality.num_tokens,
    )


def _writing_message(writing: Writing) -> common_pb2.Writing:
    return common_pb2.Writing(
        perplexity=writing.perplexity,
        dense_perplexity=writing.dense_perplexity,
        ratio=writing.ratio,
        ratio_stderr=writing.ratio_stderr,
        repeated_share=writing.repeated_share,
        dense_repeated_share=writing.dense_repeated_share,
        first_token_changed=writing.first_token_changed,
        num_prompts=writing.num_prompts,
        num_tokens=writing.num_tokens,
        repeated_stderr=writing.repeated_stderr,
    )


def _choosing_message(choosing: Choosing) -> common_pb2.Choosing:
    return common_pb2.Choosing(
        accuracy=choosing.accuracy,
        accuracy_stderr=choosing.accuracy_stderr,
        agreement=choosing.agreement,
        agreement_stderr=choosing.agreement_stderr,
        num_items=choosing.num_items,
        chance=choosing.chance,
    )


def _speed_message(speed: Speed) -> common_pb2.Speed:
    return common_pb2.Speed(
        tokens_per_second=speed.tokens_per_second,
        speedup=speed.speedup,
        num_streams=speed.num_streams,
    )
