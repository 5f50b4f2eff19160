"""The service ``fathom.v1.Inference``."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import grpc

from server.calls.call_record import current_call
from server.calls.generation import FinishInfo, GenerationEvent, PromptInfo
from server.engine.base import GenerationDelta
from server.rpc import replies, requests
from server.rpc.completions import run_completions
from server.rpc.generated.fathom.v1 import inference_pb2 as pb
from server.rpc.generated.fathom.v1 import inference_pb2_grpc
from server.rpc.pieces import in_pieces
from server.serving.service import Service


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Generation and scoring; exceptions are left to the interceptor."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GenerateResponse:
        generation, count = requests.generation(request), requests.num_completions(request)
        response = pb.GenerateResponse()
        responses = [response, *(response.others.add() for _ in range(count - 1))]
        texts: list[list[str]] = [[] for _ in responses]

        async def take(event: GenerationEvent, index: int) -> None:
            part = responses[index]
            match event:
                case PromptInfo():
                    part.prompt_info.CopyFrom(replies.prompt_info_message(event))
                case GenerationDelta():
                    delta = replies.delta_message(event, token_ids=request.output.token_ids)
                    texts[index].append(delta.text)
                    part.token_ids.extend(delta.token_ids)
                    part.logprobs.extend(delta.logprobs)
                case FinishInfo():
                    part.finish_info.CopyFrom(replies.finish_info_message(event))
                    part.served.CopyFrom(replies.served_message(event.served))

        await run_completions(
            self._service.inference,
            generation,
            count,
            take,
            current_call(),
            deadline=_deadline(context),
            may_repeat=True,
        )
        for part, pieces in zip(responses, texts, strict=True):
            part.text = "".join(pieces)
        return response

    async def GenerateStream(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        generation, count = requests.generation(request), requests.num_completions(request)
        # A call takes one message at a time.
        turn = asyncio.Lock()

        async def take(event: GenerationEvent, index: int) -> None:
            response = pb.GenerateStreamResponse(index=index)
            match event:
                case PromptInfo():
                    response.prompt_info.CopyFrom(replies.prompt_info_message(event))
                case GenerationDelta():
                    response.delta.CopyFrom(
                        replies.delta_message(event, token_ids=request.output.token_ids)
                    )
                case FinishInfo():
                    response.finish_info.CopyFrom(replies.finish_info_message(event))
            # Written rather than yielded: a generator that gRPC iterates over is not closed when a
            # call is cancelled while a message is on its way.
            async with turn:
                await context.write(response)

        await run_completions(
            self._service.inference,
            generation,
            count,
            take,
            current_call(),
            deadline=_deadline(context),
            may_repeat=False,
        )

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ScoreResponse:
        result = await self._service.inference.score(
            requests.scoring(request), deadline=_deadline(context)
        )
        current_call().served = result.served
        response = replies.score_message(result.scores, result.served)
        async for scores in in_pieces(result.scores):
            response.logprobs.extend(map(replies.logprob_message, scores))
        return response

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        ids, texts = await self._service.inference.tokenize(
            requests.text_to_tokenize(request),
            special_tokens=not request.without_special_tokens,
            deadline=_deadline(context),
        )
        response = pb.TokenizeResponse(ids=ids)
        async for piece in in_pieces(texts):
            response.tokens.extend(piece)
        return response

    async def GetModel(
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetModelResponse:
        service = self._service
        return pb.GetModelResponse(
            model=replies.model_message(
                service.model, service.engine_name, service.policy, service.repair
            )
        )


def _deadline(context: grpc.aio.ServicerContext[Any, Any]) -> float:
    """Return the client's deadline on the monotonic clock."""
    remaining = context.time_remaining()
    return math.inf if remaining is None else time.monotonic() + remaining
