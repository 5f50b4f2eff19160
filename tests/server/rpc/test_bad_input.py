"""Requests that cannot be served: the status, what it says, and a server that still serves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from server.rpc.generated.fathom.v1 import common_pb2, control_pb2, inference_pb2
from tests.server.rpc.conftest import Deployment, failure, message_of

Change = Callable[[inference_pb2.GenerateRequest], object]

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def set_sampling(**values: float) -> Change:
    return lambda r: r.sampling.MergeFrom(inference_pb2.SamplingParams(**values))  # type: ignore[arg-type]


CASES: list[tuple[Change, grpc.StatusCode, str]] = [
    (lambda r: setattr(r.depth, "layers", 0), INVALID, "depth.layers: got 0, allowed: 1 to 8"),
    (lambda r: setattr(r.depth, "layers", 9), INVALID, "depth.layers: got 9, allowed: 1 to 8"),
    (
        lambda r: setattr(r.prefill_depth, "layers", 9),
        INVALID,
        "prefill_depth.layers: got 9, allowed: 1 to 8",
    ),
    (
        lambda r: setattr(r.depth, "prune_ratio", 1.0),
        INVALID,
        "depth.prune_ratio: got 1.0, allowed: 0 or more and less than 1",
    ),
    (
        lambda r: setattr(r.depth, "prune_ratio", math.nan),
        INVALID,
        "depth.prune_ratio: got nan, allowed: 0 or more and less than 1",
    ),
    (
        lambda r: setattr(r.depth, "level", "warp"),
        grpc.StatusCode.NOT_FOUND,
        "no level 'warp'; the levels are dense, fast, generative",
    ),
    (
        lambda r: setattr(r.depth.auto, "max_quality_loss", math.inf),
        INVALID,
        "depth.auto.max_quality_loss: got inf, allowed: 0 or more",
    ),
    (
        lambda r: setattr(r.depth.auto, "max_quality_loss", 0.1),
        grpc.StatusCode.FAILED_PRECONDITION,
        "depth.auto.max_quality_loss: got 0.1, but the quality of the dense model",
    ),
    (lambda r: setattr(r, "prompt", ""), INVALID, "prompt: got '', allowed: at least one token"),
    (
        lambda r: r.ClearField("prompt"),
        INVALID,
        "input: got None, allowed: one of prompt, token_ids, chat",
    ),
    (
        lambda r: r.token_ids.SetInParent(),
        INVALID,
        "token_ids.ids: got [], allowed: at least one token",
    ),
    (
        lambda r: r.token_ids.ids.extend([1, 258]),
        INVALID,
        "token_ids.ids[1]: got 258, allowed: 0 to 257",
    ),
    (
        lambda r: r.token_ids.ids.extend([2**32 - 1]),
        INVALID,
        "token_ids.ids[0]: got 4294967295, allowed: 0 to 257",
    ),
    (
        lambda r: r.chat.SetInParent(),
        INVALID,
        "chat.messages: got [], allowed: at least one message",
    ),
    (
        lambda r: r.chat.messages.add(content="hi"),
        INVALID,
        "chat.messages[0].role: got '', allowed: a role, such as user, of at most 64 characters",
    ),
    (
        lambda r: r.chat.messages.add(role="nobody", content="hi"),
        grpc.StatusCode.FAILED_PRECONDITION,
        "model toy has no chat template",
    ),
    (
        lambda r: setattr(r, "prompt", "x" * 4095),
        INVALID,
        "prompt: got '4096 tokens', allowed: at most 4095 tokens: the context holds 4096",
    ),
    (
        lambda r: r.token_ids.ids.extend([1] * 4096),
        INVALID,
        "token_ids.ids: got '4096 tokens', allowed: at most 4095 tokens: the context holds 4096",
    ),
    (
        lambda r: setattr(r.stop, "max_tokens", 0),
        INVALID,
        "stop.max_tokens: got 0, allowed: 1 or more",
    ),
    (
        lambda r: setattr(r.stop, "min_tokens", 6),
        INVALID,
        "stop.min_tokens: got 6, allowed: at most 5, the most that can be generated",
    ),
    (
        lambda r: r.stop.stop.extend(["a", ""]),
        INVALID,
        "stop.stop[1]: got '', allowed: 1 to 256 characters",
    ),
    (
        lambda r: r.stop.stop.append("x" * 257),
        INVALID,
        f"stop.stop[0]: got 'x{'x' * 75}..., allowed: 1 to 256 characters",
    ),
    (
        lambda r: r.sampling.logit_bias.update({5: 101.0}),
        INVALID,
        "sampling.logit_bias[5]: got 101.0, allowed: -100 to 100",
    ),
    (
        lambda r: r.sampling.logit_bias.update({258: 1.0}),
        INVALID,
        "sampling.logit_bias: got 258, allowed: ids of 0 to 257",
    ),
    (
        lambda r: r.sampling.bad_words.extend(["a"] * 129),
        INVALID,
        "sampling.bad_words: got '129 entries', allowed: at most 128",
    ),
    (
        lambda r: r.sampling.bad_words.append(""),
        INVALID,
        "sampling.bad_words[0]: got '', allowed: 1 to 256 characters",
    ),
    (
        lambda r: r.sampling.allowed_token_ids.SetInParent(),
        INVALID,
        "sampling.allowed_token_ids: got [], allowed: at least one token id",
    ),
    (
        lambda r: r.sampling.allowed_token_ids.ids.append(258),
        INVALID,
        "sampling.allowed_token_ids[0]: got 258, allowed: 0 to 257",
    ),
    (
        lambda r: setattr(r.structure, "regex", ""),
        INVALID,
        "structure: got '0 characters', allowed: 1 to 65536 characters",
    ),
    (
        lambda r: r.structure.choices.texts.extend(["a", ""]),
        INVALID,
        "structure: got '2 texts', allowed: 1 to 1024 texts that are not empty",
    ),
    (
        lambda r: r.stop.stop.extend("x" * 17),
        INVALID,
        "stop.stop: got '17 entries', allowed: at most 16",
    ),
    (
        lambda r: r.stop.stop_token_ids.extend([1] * 129),
        INVALID,
        "stop.stop_token_ids: got '129 entries', allowed: at most 128",
    ),
    (
        lambda r: r.stop.stop_token_ids.append(258),
        INVALID,
        "stop.stop_token_ids[0]: got 258, allowed: 0 to 257",
    ),
    (
        lambda r: setattr(r.output, "logprobs", 21),
        INVALID,
        "output.logprobs: got 21, allowed: 0 to 20",
    ),
    (
        set_sampling(temperature=-1),
        INVALID,
        "sampling.temperature: got -1.0, allowed: 0 to 2",
    ),
    (
        set_sampling(temperature=math.nan),
        INVALID,
        "sampling.temperature: got nan, allowed: 0 to 2",
    ),
    (
        set_sampling(temperature=math.inf),
        INVALID,
        "sampling.temperature: got inf, allowed: 0 to 2",
    ),
    (set_sampling(temperature=2.1), INVALID, "sampling.temperature: got 2.1, allowed: 0 to 2"),
    (
        set_sampling(top_p=0),
        INVALID,
        "sampling.top_p: got 0.0, allowed: more than 0, up to 1",
    ),
    (
        set_sampling(top_p=1.5),
        INVALID,
        "sampling.top_p: got 1.5, allowed: more than 0, up to 1",
    ),
    (set_sampling(min_p=-0.5), INVALID, "sampling.min_p: got -0.5, allowed: 0 to 1"),
    (
        set_sampling(presence_penalty=2.5),
        INVALID,
        "sampling.presence_penalty: got 2.5, allowed: -2 to 2",
    ),
    (
        set_sampling(frequency_penalty=-2.5),
        INVALID,
        "sampling.frequency_penalty: got -2.5, allowed: -2 to 2",
    ),
    (
        set_sampling(repetition_penalty=0),
        INVALID,
        "sampling.repetition_penalty: got 0.0, allowed: more than 0",
    ),
    (
        set_sampling(seed=-1),
        INVALID,
        "sampling.seed: got -1, allowed: 0 to 9223372036854775807",
    ),
    (
        lambda r: setattr(r, "request_id", "x" * 129),
        INVALID,
        "request_id: got 'xxx",
    ),
    (
        lambda r: setattr(r, "request_id", "naïve"),
        INVALID,
        "request_id: got 'naïve', allowed: at most 128 printable ASCII characters",
    ),
    (
        lambda r: setattr(r, "request_id", "a\nb"),
        INVALID,
        "request_id: got 'a\\nb', allowed: at most 128 printable ASCII characters",
    ),
]


def sound_request() -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt="Once upon", stop=inference_pb2.StopConditions(max_tokens=5, ignore_eos=True)
    )


async def assert_serves(deployment: Deployment) -> None:
    response = await deployment.client.inference.Generate(sound_request())
    assert response.finish_info.usage.num_generated_tokens == 5
    assert deployment.service.status().load.num_running == 0


@pytest.mark.parametrize(("change", "code", "message"), CASES, ids=[case[2] for case in CASES])
async def test_generate(
    deployment: Deployment, change: Change, code: grpc.StatusCode, message: str
) -> None:
    request = sound_request()
    change(request)
    error = await failure(deployment.client.inference.Generate(request))
    assert error.code() is code
    assert message_of(error).startswith(message)
    error = await failure(deployment.client.inference.GenerateStream(request).read())
    assert error.code() is code
    assert message_of(error).startswith(message)
    assert not deployment.engine.requests
    await assert_serves(deployment)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (inference_pb2.ScoreRequest(), "input: got None, allowed: one of text, token_ids"),
        (
            inference_pb2.ScoreRequest(text=""),
            "text: got '1 tokens', allowed: at least one token to score",
        ),
        (
            inference_pb2.ScoreRequest(context_text="a", text=""),
            "text: got '0 tokens', allowed: at least one token to score",
        ),
        (
            inference_pb2.ScoreRequest(
                context_ids=inference_pb2.TokenIds(),
                token_ids=inference_pb2.TokenIds(ids=[1]),
            ),
            "context_ids.ids: got '', allowed: at least one token",
        ),
        (
            inference_pb2.ScoreRequest(context_ids=inference_pb2.TokenIds(ids=[999]), text="a"),
            "context_ids.ids[0]: got 999, allowed: 0 to 257",
        ),
        (
            inference_pb2.ScoreRequest(token_ids=inference_pb2.TokenIds(ids=[1, 300])),
            "token_ids.ids[1]: got 300, allowed: 0 to 257",
        ),
        (
            inference_pb2.ScoreRequest(text="x" * 4095),
            "text: got '4096 tokens', allowed: at most 4095 tokens",
        ),
    ],
)
async def test_score(
    deployment: Deployment, request_: inference_pb2.ScoreRequest, message: str
) -> None:
    error = await failure(deployment.client.inference.Score(request_))
    assert error.code() is INVALID
    assert message_of(error).startswith(message)
    await assert_serves(deployment)


async def test_tokenize_without_input(deployment: Deployment) -> None:
    error = await failure(deployment.client.inference.Tokenize(inference_pb2.TokenizeRequest()))
    assert error.code() is INVALID
    assert message_of(error) == "input: got None, allowed: one of text, chat"


async def test_a_message_that_is_too_large(deployment: Deployment) -> None:
    request = sound_request()
    request.prompt = "x" * 100_000_000
    error = await failure(deployment.client.inference.Generate(request))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in message_of(error)
    assert str(2**20) in message_of(error)
    await assert_serves(deployment)


@pytest.mark.parametrize("data", [b"\x12\x02\xff\xfe", b"\xff", b"\x12\x7f"])
async def test_what_is_no_message(deployment: Deployment, data: bytes) -> None:
    """The first is a prompt whose bytes are not UTF-8."""
    async with grpc.aio.insecure_channel(deployment.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/fathom.v1.Inference/Generate"
        )
        error = await failure(call(data))
    assert error.code() is INVALID
    assert message_of(error).startswith("request: got ")
    assert "allowed: the request message of fathom.v1.Inference/Generate" in message_of(error)
    await assert_serves(deployment)


async def test_an_unknown_method(deployment: Deployment) -> None:
    async with grpc.aio.insecure_channel(deployment.address) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/fathom.v1.Inference/Telepathize"
        )
        error = await failure(call(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_an_id_that_is_in_flight(deployment: Deployment) -> None:
    deployment.engine.gate.clear()
    request = sound_request()
    request.request_id = "twin"
    first = deployment.client.inference.Generate(request)
    await deployment.engine.until_running(1)
    error = await failure(deployment.client.inference.Generate(request))
    assert error.code() is INVALID
    assert message_of(error) == (
        "request_id: got 'twin', allowed: an id that no running request has"
    )
    deployment.engine.gate.set()
    assert (await first).prompt_info.request_id == "twin"


async def test_control(deployment: Deployment) -> None:
    control = deployment.client.control
    level = control_pb2.LevelSpec(name="thin")
    level.depth.layers = 9
    error = await failure(control.SetLevels(control_pb2.SetLevelsRequest(levels=[level])))
    assert error.code() is INVALID
    assert message_of(error) == "levels[0].depth: got 9, allowed: 1 to 8"
    level.depth.level = "fast"
    error = await failure(control.SetLevels(control_pb2.SetLevelsRequest(levels=[level])))
    expected = "levels[0].depth: got 'level', allowed: layers or prune_ratio"
    assert message_of(error) == expected
    level.ClearField("depth")
    error = await failure(control.SetLevels(control_pb2.SetLevelsRequest(levels=[level])))
    assert message_of(error) == (
        "levels[0].depth: got None, allowed: layers or prune_ratio, unless there is a "
        "max_quality_loss, a max_writing_loss or a max_choosing_loss"
    )
    error = await failure(control.SetLevels(control_pb2.SetLevelsRequest()))
    assert message_of(error) == "levels: got [], allowed: at least one level"
    level.depth.layers = 2
    request = control_pb2.SetLevelsRequest(levels=[level], default_level="fast")
    error = await failure(control.SetLevels(request))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert message_of(error) == "no level 'fast'; the levels are thin"
    error = await failure(
        control.SetPolicy(control_pb2.SetPolicyRequest(policy=control_pb2.Policy(level="warp")))
    )
    assert error.code() is grpc.StatusCode.NOT_FOUND
    error = await failure(control.Drain(control_pb2.DrainRequest(grace_seconds=math.nan)))
    assert message_of(error) == "grace_seconds: got nan, allowed: 0 or more"
    calls = control.Calibrate(control_pb2.CalibrateRequest(texts=[""]))
    error = await failure(calls.read())
    assert error.code() is INVALID
    assert message_of(error).startswith("texts: got [''], allowed: texts with tokens")
    calls = control.Calibrate(control_pb2.CalibrateRequest(max_tokens=1))
    error = await failure(calls.read())
    assert message_of(error) == "max_tokens: got 1, allowed: 2 or more"
    assert deployment.service.policy.levels[0].name == "dense"
    await assert_serves(deployment)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"max_quality_loss": -0.5}, "max_quality_loss: got -0.5, allowed: 0 or more"),
        ({"max_quality_loss": math.nan}, "max_quality_loss: got nan, allowed: 0 or more"),
        ({"max_quality_loss": math.inf}, "max_quality_loss: got inf, allowed: 0 or more"),
        (
            {"max_quality_loss": 0.1, "depth": common_pb2.Depth(layers=4)},
            "depth: got 4, allowed: nothing beside max_quality_loss, which decides about the depth",
        ),
        (
            {"max_quality_loss": 0.1, "prefill_depth": common_pb2.Depth(layers=4)},
            "prefill_depth: got 4, allowed: nothing beside max_quality_loss, which decides about "
            "the depth",
        ),
        (
            {"depth": common_pb2.Depth(layers=4), "prompt_only": True},
            "prompt_only: got True, allowed: true beside a limit of what the level may lose alone; "
            "prefill_depth prunes the prompt to a depth",
        ),
        ({"max_writing_loss": -0.5}, "max_writing_loss: got -0.5, allowed: 0 or more"),
        ({"max_choosing_loss": 1.5}, "max_choosing_loss: got 1.5, allowed: 0 to 1"),
        (
            {"max_writing_loss": 0.1, "depth": common_pb2.Depth(layers=4)},
            "depth: got 4, allowed: nothing beside max_writing_loss, which decides about the depth",
        ),
        (
            {"max_writing_loss": 0.1},
            "max_writing_loss: got 0.1, allowed: a depth, or another limit: writing is not "
            "measured, because the held-out text has 200 tokens in 2 windows, which give 6 pieces "
            "of 32 tokens, allowed: 8 or more, which takes 256 tokens or more",
        ),
        (
            {"max_choosing_loss": 0.1, "max_quality_loss": 0.1},
            "max_choosing_loss: got 0.1, allowed: a depth, or another limit: choosing is not "
            "measured, because the held-out text has 200 tokens in 2 windows, which give 6 pieces "
            "of 32 tokens, allowed: 16 or more, which takes 512 tokens or more",
        ),
    ],
)
async def test_levels_by_quality(
    deployment: Deployment, fields: dict[str, Any], problem: str
) -> None:
    request = control_pb2.SetLevelsRequest(levels=[control_pb2.LevelSpec(name="a", **fields)])
    error = await failure(deployment.client.control.SetLevels(request))
    assert error.code() is INVALID
    assert message_of(error) == f"levels[0].{problem}"


async def test_an_error_of_our_own_says_nothing_of_the_inside(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(text: str, *, special_tokens: bool = True) -> list[int]:
        raise ZeroDivisionError("secret of the inside")

    monkeypatch.setattr(deployment.engine, "tokenize", broken)
    error = await failure(deployment.client.inference.Generate(sound_request()))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in message_of(error)
    record = next(record for record in caplog.records if record.exc_info)
    assert "secret of the inside" in str(record.exc_info)
    monkeypatch.undo()
    await assert_serves(deployment)
