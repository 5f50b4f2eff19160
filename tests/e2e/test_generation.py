"""Generations over gRPC, at every depth, against models that are really pruned."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.base import LayerSelection
from server.model.source import DEMO_MODEL
from server.rpc.client import Client
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2
from tests.e2e.calls import Streamed, at_once, failure, greedy_request, requested
from tests.e2e.running_server import RunningServer
from tests.server.engine.elastic import reference

NUM_TOKENS = 24
PROMPTS = [
    "Once upon a time there was",
    "Return the list of",
    "The little dog ran to the house and said that",
]
DEMO_PAIRS = [(16, 16), (13, 13), (8, 8), (2, 2), (1, 1), (8, 16), (16, 8), (5, 11), (11, 5)]


@dataclass(frozen=True)
class Subject:
    """A server, the checkpoint it serves, and the plan it reports."""

    server: RunningServer
    checkpoint: Path
    dense: Any
    removal_order: list[int]
    # (prefill depth, decode depth).
    pairs: list[tuple[int, int]]

    def selection(self, prefill: int, decode: int) -> LayerSelection:
        return LayerSelection(self._skipped(prefill), self._skipped(decode))

    def _skipped(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted(self.removal_order[: len(self.removal_order) - depth]))

    def expected(self, prompt_ids: list[int], prefill: int, decode: int) -> list[int]:
        selection = self.selection(prefill, decode)
        if prefill == decode:
            cut = reference.cut(self.checkpoint, selection.decode_skips)
            return reference.generate(cut, prompt_ids, NUM_TOKENS)
        return reference.generate_with_skips(self.dense, prompt_ids, NUM_TOKENS, selection)

    def logprobs(
        self, token_ids: list[int], num_context: int, prefill: int, decode: int
    ) -> torch.Tensor:
        """Return log-probabilities [num_tokens - num_context, vocab_size] of what comes next."""
        logits = reference.logits_with_skips(
            self.dense, token_ids, num_context, self.selection(prefill, decode)
        )
        return torch.log_softmax(logits[num_context - 1 : -1].double(), dim=-1)


@pytest.fixture(scope="module", params=["stories", "demo"])
def subject(request: pytest.FixtureRequest) -> Subject:
    server: RunningServer = request.getfixturevalue(f"{request.param}_server")
    checkpoint = DEMO_MODEL
    pairs = DEMO_PAIRS
    if request.param == "stories":
        checkpoint = request.getfixturevalue("stories_model")
        pairs = list(itertools.product(range(1, 6), range(1, 6)))
    with server.client() as client:
        order = list(client.get_plan().plan.removal_order)
    return Subject(server, checkpoint, reference.load(checkpoint), order, pairs)


def tokenized(client: Client, text: str) -> list[int]:
    return list(client.tokenize(inference_pb2.TokenizeRequest(text=text)).ids)


def test_every_depth_in_one_batch_unary_and_streaming(subject: Subject) -> None:
    """All requests at once: each pair of depths as text and unary, as tokens and streaming."""
    with subject.server.client() as client:
        ids = {prompt: tokenized(client, prompt) for prompt in PROMPTS}
        cases = list(zip(subject.pairs, itertools.cycle(PROMPTS), strict=False))

        def unary(case: tuple[tuple[int, int], str]) -> inference_pb2.GenerateResponse:
            (prefill, decode), prompt = case
            return client.generate(
                greedy_request(prompt, NUM_TOKENS, depth=decode, prefill_depth=prefill)
            )

        def stream(case: tuple[tuple[int, int], str]) -> Streamed:
            (prefill, decode), prompt = case
            request = greedy_request(ids[prompt], NUM_TOKENS, depth=decode, prefill_depth=prefill)
            return Streamed.of(client.generate_stream(request))

        calls = [(call, case) for case in cases for call in (unary, stream)]
        random.Random(0).shuffle(calls)
        answers = at_once(lambda call: call[0](call[1]), calls)

    texts: dict[tuple[int, int], set[str]] = {}
    for (_, ((prefill, decode), prompt)), answer in zip(calls, answers, strict=True):
        served = requested(prefill, decode)
        assert list(answer.token_ids) == subject.expected(ids[prompt], prefill, decode), served
        assert answer.prompt_info.served == served
        assert answer.prompt_info.num_prompt_tokens == len(ids[prompt])
        assert answer.finish_info.served == served
        assert answer.finish_info.reason == inference_pb2.FinishInfo.REASON_LENGTH
        assert answer.finish_info.usage.num_prompt_tokens == len(ids[prompt])
        assert answer.finish_info.usage.num_generated_tokens == NUM_TOKENS
        if isinstance(answer, inference_pb2.GenerateResponse):
            assert answer.served == served
        texts.setdefault((prefill, decode), set()).add(answer.text)
    assert {len(both) for both in texts.values()} == {1}, "a stream's text is that of the answer"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_completions_are_those_of_calls_of_their_own(
    stories_server: RunningServer, temperature: float
) -> None:
    request = greedy_request(PROMPTS[0], NUM_TOKENS, depth=4, prefill_depth=3)
    request.sampling.temperature = temperature
    request.sampling.seed = 11
    with stories_server.client() as client:
        alone = []
        for seed in range(11, 15):
            one = inference_pb2.GenerateRequest()
            one.CopyFrom(request)
            one.sampling.seed = seed
            alone.append(client.generate(one))
        request.n = 4
        together = client.generate(request)
        messages = list(client.generate_stream(request))
    expected = [list(each.token_ids) for each in alone]
    assert len({tuple(ids) for ids in expected}) == (1 if temperature == 0 else 4)
    assert [list(each.token_ids) for each in (together, *together.others)] == expected
    streams = [Streamed.of(each for each in messages if each.index == i) for i in range(4)]
    assert [stream.token_ids for stream in streams] == expected
    assert [stream.text for stream in streams] == [each.text for each in alone]


def test_log_probabilities_of_generated_tokens(subject: Subject) -> None:
    num_layers = len(subject.removal_order)
    prefill, decode = num_layers - 2, num_layers - 1
    with subject.server.client() as client:
        ids = tokenized(client, PROMPTS[0])
        request = greedy_request(ids, NUM_TOKENS, depth=decode, prefill_depth=prefill)
        request.output.logprobs = 3
        response = client.generate(request)
        streamed = Streamed.of(client.generate_stream(request))
    token_ids = list(response.token_ids)
    expected = subject.logprobs(ids + token_ids, len(ids), prefill, decode)
    best = expected.topk(3)
    for logprobs in (response.logprobs, streamed.logprobs):
        assert [each.token_id for each in logprobs] == token_ids
        assert [each.logprob for each in logprobs] == pytest.approx(
            expected[range(NUM_TOKENS), token_ids].tolist(), abs=1e-4
        )
        assert [[top.token_id for top in each.top] for each in logprobs] == best.indices.tolist()
        tops = [top.logprob for each in logprobs for top in each.top]
        assert tops == pytest.approx(best.values.flatten().tolist(), abs=1e-4)


def test_score(subject: Subject) -> None:
    num_layers = len(subject.removal_order)
    with subject.server.client() as client:
        ids = tokenized(client, PROMPTS[2])
        for prefill, decode in [(num_layers, num_layers), (2, num_layers - 1)]:
            response = client.score(
                inference_pb2.ScoreRequest(
                    context_ids=inference_pb2.TokenIds(ids=ids[:4]),
                    token_ids=inference_pb2.TokenIds(ids=ids[4:]),
                    depth=common_pb2.Depth(layers=decode),
                    prefill_depth=common_pb2.Depth(layers=prefill),
                )
            )
            expected = subject.logprobs(ids, 4, prefill, decode)
            scores = [each.logprob for each in response.logprobs]
            assert [each.token_id for each in response.logprobs] == ids[4:]
            assert scores == pytest.approx(
                expected[range(len(ids) - 4), ids[4:]].tolist(), abs=1e-4
            )
            assert response.total_logprob == pytest.approx(math.fsum(scores))
            assert response.served == requested(prefill, decode)


def test_stop_string_and_stop_token(subject: Subject) -> None:
    with subject.server.client() as client:
        request = greedy_request(PROMPTS[0], 64)
        whole = client.generate(request)
        # The last five characters that have not been there before.
        end = max(
            i for i in range(5, len(whole.text)) if whole.text.find(whole.text[i - 5 : i]) == i - 5
        )
        stop = whole.text[end - 5 : end]
        request.stop.stop.extend(["never\x01generated", stop])
        for include_stop in (False, True):
            request.stop.include_stop = include_stop
            expected = whole.text[: end if include_stop else end - 5]
            response = client.generate(request)
            streamed = Streamed.of(client.generate_stream(request))
            for answer in (response, streamed):
                assert answer.text == expected
                assert answer.finish_info.reason == inference_pb2.FinishInfo.REASON_STOP
                assert answer.finish_info.stop_string == stop
                assert not answer.finish_info.HasField("stop_token_id")

        stop_token = max(whole.token_ids, key=list(whole.token_ids).index)
        request = greedy_request(PROMPTS[0], 64)
        request.stop.stop_token_ids.append(stop_token)
        response = client.generate(request)
        length = list(whole.token_ids).index(stop_token) + 1
        assert list(response.token_ids) == list(whole.token_ids)[:length]
        assert response.finish_info.reason == inference_pb2.FinishInfo.REASON_STOP
        assert response.finish_info.stop_token_id == stop_token


def test_echo(subject: Subject) -> None:
    with subject.server.client() as client:
        request = greedy_request(PROMPTS[1], 8)
        without = client.generate(request).text
        request.output.echo = True
        assert client.generate(request).text == PROMPTS[1] + without
        assert Streamed.of(client.generate_stream(request)).text == PROMPTS[1] + without


def test_ways_to_choose_a_depth(subject: Subject) -> None:
    with subject.server.client() as client:
        model = client.get_model()
        perplexities = {row.decode_layers: row.quality.perplexity for row in model.depths}
        assert set(perplexities) == set(range(1, model.num_layers + 1))
        deep = min(
            depth
            for depth, perplexity in perplexities.items()
            if perplexity <= perplexities[model.num_layers]
        )
        level, default = model.levels[1], model.levels[0]
        assert default.is_default
        auto = common_pb2.Served.REASON_AUTO
        named = common_pb2.Served.REASON_REQUESTED
        for depth, layers, reason in [
            (None, default.decode_layers, common_pb2.Served.REASON_DEFAULT),
            (common_pb2.Depth(level=level.name), level.decode_layers, named),
            (common_pb2.Depth(prune_ratio=0.0), model.num_layers, named),
            (common_pb2.Depth(prune_ratio=0.999), 1, named),
            (common_pb2.Depth(auto=common_pb2.Auto()), default.decode_layers, auto),
            (common_pb2.Depth(auto=common_pb2.Auto(max_quality_loss=0.0)), deep, auto),
        ]:
            request = greedy_request(PROMPTS[0], 4)
            if depth is not None:
                request.depth.CopyFrom(depth)
            by_layers = greedy_request(PROMPTS[0], 4, depth=layers)
            response = client.generate(request)
            assert response.token_ids == client.generate(by_layers).token_ids
            assert response.served == common_pb2.Served(
                prefill_layers=layers, decode_layers=layers, reason=reason
            )


def test_a_seed_makes_random_choices_repeatable(demo_client: Client) -> None:
    def sample(seed: int) -> list[int]:
        request = greedy_request(PROMPTS[1], 32, depth=8)
        request.sampling.temperature = 1.0
        request.sampling.seed = seed
        return list(demo_client.generate(request).token_ids)

    alone = [sample(seed) for seed in range(4)]
    assert at_once(sample, range(4)) == alone
    assert len({tuple(ids) for ids in alone}) == 4


def test_chat_where_the_model_has_a_template(demo_client: Client) -> None:
    chat = inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role="user", content="The list of methods")]
    )
    request = greedy_request("", 8, depth=12)
    request.chat.CopyFrom(chat)
    ids = demo_client.tokenize(inference_pb2.TokenizeRequest(chat=chat)).ids
    same = demo_client.generate(greedy_request(ids, 8, depth=12))
    response = demo_client.generate(request)
    assert response.token_ids == same.token_ids
    assert response.prompt_info.num_prompt_tokens == len(ids)
    assert Streamed.of(demo_client.generate_stream(request)).text == same.text


def test_chat_where_it_has_none(stories_client: Client) -> None:
    request = greedy_request("", 8)
    request.chat.messages.add(role="user", content="Tell me a story")
    error = failure(lambda: stories_client.generate(request))
    assert error.code == "FAILED_PRECONDITION"
    assert "has no chat template; send a prompt or token ids" in error.message


def test_more_requests_than_fit_into_the_batch(stories_client: Client) -> None:
    """They wait for their turn, and each is answered as if it were alone."""
    requests = [
        greedy_request(PROMPTS[number % 3], 16, depth=1 + number % 5) for number in range(150)
    ]
    answers = at_once(stories_client.generate, requests)
    for number, answer in enumerate(answers):
        assert answer.token_ids == answers[number % 15].token_ids
        assert answer.served == requested(1 + number % 5, 1 + number % 5)
