"""The path of a request up to the engine, without a server around it."""

from __future__ import annotations

from google.protobuf.message import DecodeError, Message

from pruning.quality import Quality
from server.depth.auto_rules import AutoRules, check_rules, ladder
from server.depth.levels import DepthPair, check_levels
from server.depth.measured import Measured
from server.depth.policy import DepthPolicy
from server.errors import FathomError
from server.rpc import replies, requests
from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2
from server.rpc.status import status_of
from tests.fuzz.messages import REQUESTS, request_from
from tests.server.rpc.conftest import LEVELS, make_plan

_POLICY = DepthPolicy(
    make_plan(),
    LEVELS,
    measured=Measured(
        {DepthPair(d, d): Quality(10.0 + 8 - d, 0.1, d / 8, 0.1, 100) for d in range(1, 9)}
    ),
)


def check_structured(data: bytes) -> bool:
    """Check the message that the bytes stand for; return whether it was accepted."""
    message = request_from(data)
    # As it would arrive.
    return _check(type(message).FromString(message.SerializeToString()))


def check_raw(data: bytes) -> bool:
    """Check the bytes as they are, as each of the messages; return whether any was accepted."""
    accepted = False
    for kind in REQUESTS:
        try:
            message = kind.FromString(data)
        except DecodeError:
            continue
        accepted |= _check(message)
    return accepted


def _check(message: Message) -> bool:
    """Raise errors that are not meant for clients."""
    try:
        _convert(message)
    except FathomError as error:
        status = status_of(error)
        assert status.details, "an error without a message"
        return False
    return True


def _convert(message: Message) -> None:
    match message:
        case inference_pb2.GenerateRequest():
            generation = requests.generation(message)
            assert 1 <= requests.num_completions(message) <= 128
            _, served = _POLICY.resolve(generation.depth, generation.prefill_depth)
            assert 1 <= served.decode_layers <= 8
            assert 1 <= served.prefill_layers <= 8
            replies.served_message(served)
        case inference_pb2.ScoreRequest():
            scoring = requests.scoring(message)
            _POLICY.resolve(scoring.depth, scoring.prefill_depth)
        case inference_pb2.TokenizeRequest():
            requests.text_to_tokenize(message)
        case control_pb2.SetLevelsRequest():
            specs = requests.level_specs(message)
            levels = check_levels(spec.resolve(8, f"levels[{i}]") for i, spec in enumerate(specs))
            default = message.default_level if message.HasField("default_level") else None
            _POLICY.with_levels(levels, default)
        case control_pb2.SetPolicyRequest():
            level, rules = requests.auto_rules(message.policy, AutoRules())
            check_rules(_POLICY, rules, "policy.ladder")
            policy = _POLICY if level is None else _POLICY.with_auto_level(level)
            assert ladder(policy, rules)
            replies.policy_message(policy, rules)
        case control_pb2.DrainRequest():
            requests.grace_seconds(message)
