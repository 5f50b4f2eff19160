"""How large replies get, beside the 4 MiB that a gRPC client accepts unless it is told otherwise.

The numbers of tokens are those of docs/operations.md, for tokens of five characters.
"""

from __future__ import annotations

import pytest

from server.depth.served_depth import Reason, ServedDepth
from server.engine.base import GenerationDelta, TokenScore
from server.rpc import replies
from server.rpc.generated.fathom.v1 import inference_pb2

CLIENT_LIMIT = 4 * 2**20
TEXT = " word"
LARGEST_ID = 2**18 - 1
# Tokens and log-probabilities that are merged into one message at most.
MAX_DELTA_SIZE = 4096
SERVED = ServedDepth(32, 32, Reason.REQUESTED)


def scores(num_tokens: int, num_top: int = 0) -> tuple[TokenScore, ...]:
    top = tuple(TokenScore(LARGEST_ID, -1.5, TEXT, ()) for _ in range(num_top))
    return (TokenScore(LARGEST_ID, -1.5, TEXT, top),) * num_tokens


def generated(num_tokens: int, num_top: int) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        text=TEXT * num_tokens,
        token_ids=[LARGEST_ID] * num_tokens,
        logprobs=map(replies.logprob_message, scores(num_tokens, num_top)),
    )


@pytest.mark.parametrize(("num_tokens", "num_top"), [(120_000, 0), (8_000, 20)])
def test_generate(num_tokens: int, num_top: int) -> None:
    assert generated(num_tokens, num_top).ByteSize() <= CLIENT_LIMIT
    assert generated(num_tokens * 5 // 4, num_top).ByteSize() > CLIENT_LIMIT


def test_score() -> None:
    def scored(num_tokens: int) -> int:
        response = replies.score_message(scores(num_tokens), SERVED)
        response.logprobs.extend(map(replies.logprob_message, scores(num_tokens)))
        return response.ByteSize()

    assert scored(160_000) <= CLIENT_LIMIT < scored(200_000)


def test_tokenize() -> None:
    def tokenized(num_tokens: int) -> int:
        ids, texts = [LARGEST_ID] * num_tokens, [TEXT] * num_tokens
        return inference_pb2.TokenizeResponse(ids=ids, tokens=texts).ByteSize()

    assert tokenized(400_000) <= CLIENT_LIMIT < tokenized(500_000)


@pytest.mark.parametrize("num_top", [0, 20])
def test_messages_of_a_stream_always_fit(num_top: int) -> None:
    """The fullest message that is merged for a slow client, of tokens of 64 bytes."""
    num_tokens = MAX_DELTA_SIZE // (2 + num_top)
    delta = GenerationDelta(
        text="x" * 64 * num_tokens,
        token_ids=(LARGEST_ID,) * num_tokens,
        scores=scores(num_tokens, num_top),
    )
    assert replies.delta_message(delta, token_ids=True).ByteSize() < CLIENT_LIMIT / 4
