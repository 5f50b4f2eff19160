"""Generation, scoring and tokenization over gRPC."""

from __future__ import annotations

import asyncio
import math

import pytest

from server.engine.base import LayerSelection
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2
from tests.server.rpc.conftest import LEVELS, REMOVAL_ORDER, Deployment, collect
from tests.server.rpc.toy_engine import BOS, EOS, expected_tokens, logprob

PROMPT = "Once upon a time"
PROMPT_IDS = [BOS, *PROMPT.encode()]


def selection(prefill: int, decode: int) -> LayerSelection:
    return LayerSelection(
        tuple(sorted(REMOVAL_ORDER[: 8 - prefill])), tuple(sorted(REMOVAL_ORDER[: 8 - decode]))
    )


def request(
    max_tokens: int = 12, *, ignore_eos: bool = True, token_ids: bool = True
) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        prompt=PROMPT,
        sampling=inference_pb2.SamplingParams(temperature=0),
        stop=inference_pb2.StopConditions(max_tokens=max_tokens, ignore_eos=ignore_eos),
        output=inference_pb2.OutputOptions(token_ids=token_ids),
    )


@pytest.mark.parametrize("depth", range(1, 9))
async def test_every_depth(deployment: Deployment, depth: int) -> None:
    asked = request()
    asked.depth.layers = depth
    response = await deployment.client.inference.Generate(asked)
    expected = expected_tokens(PROMPT_IDS, selection(depth, depth), 12)
    assert list(response.token_ids) == expected
    assert response.text == bytes(expected).decode()
    assert response.served == common_pb2.Served(
        prefill_layers=depth, decode_layers=depth, reason=common_pb2.Served.REASON_REQUESTED
    )


@pytest.mark.parametrize(
    ("depth", "prefill", "decode", "reason"),
    [
        (None, 8, 8, common_pb2.Served.REASON_DEFAULT),
        (common_pb2.Depth(), 8, 8, common_pb2.Served.REASON_DEFAULT),
        (common_pb2.Depth(prune_ratio=0.5), 4, 4, common_pb2.Served.REASON_REQUESTED),
        (common_pb2.Depth(prune_ratio=0.0), 8, 8, common_pb2.Served.REASON_REQUESTED),
        (common_pb2.Depth(level="generative"), 4, 8, common_pb2.Served.REASON_REQUESTED),
        (common_pb2.Depth(auto=common_pb2.Auto()), 8, 8, common_pb2.Served.REASON_AUTO),
    ],
)
async def test_ways_to_choose_a_depth(
    deployment: Deployment,
    depth: common_pb2.Depth | None,
    prefill: int,
    decode: int,
    reason: common_pb2.Served.Reason,
) -> None:
    asked = request()
    if depth is not None:
        asked.depth.CopyFrom(depth)
    response = await deployment.client.inference.Generate(asked)
    assert list(response.token_ids) == expected_tokens(PROMPT_IDS, selection(prefill, decode), 12)
    assert response.served == common_pb2.Served(
        prefill_layers=prefill, decode_layers=decode, reason=reason
    )
    assert response.prompt_info.served == response.served
    assert response.finish_info.served == response.served


async def test_prefill_depth_apart(deployment: Deployment) -> None:
    asked = request()
    asked.depth.layers = 8
    asked.prefill_depth.layers = 3
    response = await deployment.client.inference.Generate(asked)
    assert list(response.token_ids) == expected_tokens(PROMPT_IDS, selection(3, 8), 12)
    assert (response.served.prefill_layers, response.served.decode_layers) == (3, 8)


async def test_many_depths_at_once(deployment: Deployment) -> None:
    depths = [1 + i % 8 for i in range(64)]
    requests = []
    for depth in depths:
        requests.append(request())
        requests[-1].depth.layers = depth
    responses = await asyncio.gather(*map(deployment.client.inference.Generate, requests))
    for depth, response in zip(depths, responses, strict=True):
        assert list(response.token_ids) == expected_tokens(PROMPT_IDS, selection(depth, depth), 12)


async def test_stream_has_the_parts_of_the_unary_reply(deployment: Deployment) -> None:
    asked = request()
    asked.output.logprobs = 2
    asked.output.echo = True
    first, *deltas, last = await collect(deployment.client.inference.GenerateStream(asked))
    assert first.WhichOneof("event") == "prompt_info"
    assert {message.WhichOneof("event") for message in deltas} == {"delta"}
    assert last.WhichOneof("event") == "finish_info"
    unary = await deployment.client.inference.Generate(asked)
    assert "".join(message.delta.text for message in deltas) == unary.text
    assert [i for message in deltas for i in message.delta.token_ids] == list(unary.token_ids)
    assert [s for message in deltas for s in message.delta.logprobs] == list(unary.logprobs)
    # Fewer where the reader was slower than the engine: then steps share a message.
    assert 2 <= len(deltas) <= 1 + 12
    assert first.prompt_info.served == unary.prompt_info.served
    assert first.prompt_info.num_prompt_tokens == len(PROMPT_IDS)
    assert last.finish_info.usage == unary.finish_info.usage


async def test_output_options(deployment: Deployment) -> None:
    plain = await deployment.client.inference.Generate(request(token_ids=False))
    assert not plain.token_ids
    assert not plain.logprobs
    asked = request()
    asked.output.echo = True
    asked.output.logprobs = 2
    full = await deployment.client.inference.Generate(asked)
    assert full.text == PROMPT + plain.text
    assert bytes(full.token_ids).decode() == plain.text
    assert [score.token_id for score in full.logprobs] == list(full.token_ids)
    ids = list(PROMPT_IDS)
    for score in full.logprobs:
        assert score.logprob == logprob(ids, score.token_id, LayerSelection())
        assert [other.token_id for other in score.top] == [ord("a"), ord("b")]
        assert score.text == chr(score.token_id)
        ids.append(score.token_id)


async def test_token_ids_and_chat_as_input(deployment: Deployment) -> None:
    asked = request()
    asked.token_ids.ids.extend([BOS, 0, 255, 97])
    asked.output.echo = True
    response = await deployment.client.inference.Generate(asked)
    expected = expected_tokens([BOS, 0, 255, 97], LayerSelection(), 12)
    assert list(response.token_ids) == expected
    # A byte that is no character by itself is shown as the replacement character.
    assert response.text == "\0\N{REPLACEMENT CHARACTER}a" + bytes(expected).decode()
    asked = request()
    asked.chat.messages.add(role="user", content="hi")
    response = await deployment.client.inference.Generate(asked)
    chat_ids = [BOS, *b"user:hi\n"]
    assert list(response.token_ids) == expected_tokens(chat_ids, LayerSelection(), 12)
    assert response.prompt_info.num_prompt_tokens == len(chat_ids)


async def test_how_a_request_ends(deployment: Deployment) -> None:
    by_length = await deployment.client.inference.Generate(request(3))
    assert by_length.finish_info.reason == inference_pb2.FinishInfo.REASON_LENGTH
    assert by_length.finish_info.usage == inference_pb2.Usage(
        num_prompt_tokens=len(PROMPT_IDS), num_generated_tokens=3, num_cached_tokens=1
    )
    asked = request(100)
    asked.stop.stop_token_ids.append(by_length.token_ids[1])
    by_token = await deployment.client.inference.Generate(asked)
    assert by_token.finish_info.reason == inference_pb2.FinishInfo.REASON_STOP
    assert by_token.finish_info.stop_token_id == by_length.token_ids[1]
    assert not by_token.finish_info.HasField("stop_string")
    asked = request(100)
    asked.stop.stop.append(by_length.text[1:3])
    by_string = await deployment.client.inference.Generate(asked)
    assert by_string.finish_info.stop_string == by_length.text[1:3]
    assert not by_string.finish_info.HasField("stop_token_id")
    by_end = await deployment.client.inference.Generate(request(4000, ignore_eos=False))
    assert by_end.finish_info.reason == inference_pb2.FinishInfo.REASON_STOP
    assert by_end.token_ids[-1] == EOS
    timings = by_end.finish_info.timings
    assert timings.queue >= 0.25
    assert 0 < timings.time_to_first_token <= timings.total


async def test_sampling_parameters_reach_the_engine(deployment: Deployment) -> None:
    asked = request(5)
    asked.sampling.CopyFrom(
        inference_pb2.SamplingParams(
            temperature=0.5,
            top_p=0.75,
            top_k=40,
            min_p=0.25,
            presence_penalty=-2,
            frequency_penalty=2,
            repetition_penalty=1.5,
            seed=2**63 - 1,
        )
    )
    asked.stop.min_tokens = 2
    asked.stop.include_stop = True
    await deployment.client.inference.Generate(asked)
    sampling = deployment.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.75, 40)
    assert (sampling.min_p, sampling.seed) == (0.25, 2**63 - 1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2.0, 2.0)
    assert sampling.repetition_penalty == 1.5
    assert (sampling.min_tokens, sampling.max_tokens) == (2, 5)
    assert sampling.include_stop
    assert sampling.ignore_eos


async def test_absent_parameters_are_left_to_the_engine(deployment: Deployment) -> None:
    asked = inference_pb2.GenerateRequest(prompt=PROMPT)
    response = await deployment.client.inference.Generate(asked)
    sampling = deployment.engine.requests[-1].sampling
    assert sampling.temperature is None
    assert sampling.top_p is None
    assert sampling.top_k is None
    assert sampling.seed is None
    assert sampling.logprobs is None
    # As many tokens as the context holds.
    assert sampling.max_tokens == 4096 - len(PROMPT_IDS)
    assert response.prompt_info.request_id


async def test_request_ids_are_echoed(deployment: Deployment) -> None:
    asked = request()
    asked.request_id = "my id/7"
    response = await deployment.client.inference.Generate(asked)
    assert response.prompt_info.request_id == "my id/7"
    again = await deployment.client.inference.Generate(asked)
    assert again.prompt_info.request_id == "my id/7"


async def test_score(deployment: Deployment) -> None:
    asked = inference_pb2.ScoreRequest(
        context_text="ab", text="cd", depth=common_pb2.Depth(level="generative")
    )
    response = await deployment.client.inference.Score(asked)
    ids, layers = [BOS, *b"abcd"], selection(4, 8)
    expected = [logprob(ids[:i], ids[i], layers) for i in (3, 4)]
    assert [score.token_id for score in response.logprobs] == ids[3:]
    assert [score.logprob for score in response.logprobs] == expected
    assert response.total_logprob == math.fsum(expected)
    assert (response.served.prefill_layers, response.served.decode_layers) == (4, 8)


async def test_score_without_context_or_from_ids(deployment: Deployment) -> None:
    score = deployment.client.inference.Score
    whole = await score(inference_pb2.ScoreRequest(text="abcd"))
    assert [s.token_id for s in whole.logprobs] == list(b"abcd")
    ids = inference_pb2.TokenIds(ids=[BOS, *b"abcd"])
    assert (await score(inference_pb2.ScoreRequest(token_ids=ids))).logprobs == whole.logprobs
    context = inference_pb2.TokenIds(ids=[BOS, *b"ab"])
    split = await score(inference_pb2.ScoreRequest(context_ids=context, text="cd"))
    assert list(split.logprobs) == list(whole.logprobs)[2:]


async def test_tokenize(deployment: Deployment) -> None:
    tokenize = deployment.client.inference.Tokenize
    response = await tokenize(inference_pb2.TokenizeRequest(text="hé"))
    assert list(response.ids) == [BOS, *"hé".encode()]
    assert list(response.tokens) == ["", "h", "\ufffd", "\ufffd"]
    asked = inference_pb2.TokenizeRequest(text="hi", without_special_tokens=True)
    assert list((await tokenize(asked)).ids) == list(b"hi")
    asked = inference_pb2.TokenizeRequest()
    asked.chat.messages.add(role="user", content="hi")
    assert list((await tokenize(asked)).ids) == [BOS, *b"user:hi\n"]


async def test_get_model(deployment: Deployment) -> None:
    model = (await deployment.client.inference.GetModel(inference_pb2.GetModelRequest())).model
    assert (model.name, model.engine, model.dtype) == ("toy", "toy", "float32")
    assert (model.num_layers, model.vocab_size, model.max_context) == (8, 258, 4096)
    assert [(level.name, level.prefill_layers, level.decode_layers) for level in model.levels] == [
        (level.name, level.prefill_layers, level.decode_layers) for level in LEVELS
    ]
    assert [level.is_default for level in model.levels] == [True, False, False]
    assert not model.levels[0].HasField("quality")
    assert list(model.plan.removal_order) == list(REMOVAL_ORDER)
