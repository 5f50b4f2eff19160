"""The routes of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError

from server.calls.call_record import current_call
from server.calls.generation import ChatPrompt, Prompt, RenderedPrompt, TextPrompt, TokenPrompt
from server.depth.served_depth import ServedDepth
from server.errors import InvalidArgument
from server.openai import body as bodies
from server.openai.call import Call, Refused, set_current
from server.openai.depth_names import HEADER, depths_asked
from server.openai.models import ModelList
from server.openai.sampling import sampling_options
from server.openai.serving import Chats, Completions
from server.serving.completions import MAX_COMPLETIONS
from server.serving.service import Service

M = TypeVar("M", bound=BaseModel)

# Below it vLLM takes the most likely token.
_GREEDY = 1e-5
# What vLLM is given where the service has read prompts or messages already.
_NO_PROMPT = "."
_NO_MESSAGES = [{"role": "user", "content": "."}]

_TOKENIZE = frozenset({"model", "prompt", "messages", "add_special_tokens", "return_token_strs"})
_DETOKENIZE = frozenset({"model", "tokens"})


class Routes:
    """Answers requests of OpenAI's API by the service; raises what the service raises."""

    def __init__(self, service: Service, completions: Completions, chats: Chats) -> None:
        self._service = service
        self._completions = completions
        self._chats = chats
        self._models = ModelList(service)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.get_model, methods=["GET"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._models.all()})

    async def get_model(self, request: Request) -> Response:
        return JSONResponse(self._models.one(request.path_params["name"]))

    async def complete(self, request: Request) -> Response:
        body = bodies.parsed(await request.body())
        fields = bodies.check_fields(body, bodies.COMPLETION, _defaults(CompletionRequest))
        asked = _validated(CompletionRequest, {**fields, "prompt": _NO_PROMPT})
        prompts = bodies.prompts_of(fields.get("prompt"), special_tokens=asked.add_special_tokens)
        echo_alone = bool(asked.echo) and asked.max_tokens == 0
        prompt_logprobs = asked.prompt_logprobs
        if prompt_logprobs is None and asked.echo:
            prompt_logprobs = asked.logprobs
        call = self._call(
            request,
            body,
            asked,
            prompts,
            partial(
                sampling_options,
                asked,
                max_tokens=1 if echo_alone else asked.max_tokens,
                logprobs=asked.logprobs,
                prompt_logprobs=prompt_logprobs,
            ),
            echo=bool(asked.echo),
        )
        return await _answer(call, lambda: self._completions.create_completion(asked))

    async def chat(self, request: Request) -> Response:
        body = bodies.parsed(await request.body())
        fields = bodies.check_fields(body, bodies.CHAT, _defaults(ChatCompletionRequest))
        plain = bodies.plain_chat(fields.get("messages"))
        if plain is not None:
            fields["messages"] = _NO_MESSAGES
        asked = _validated(ChatCompletionRequest, fields)
        with _vllms_refusals():
            self._chats.prepare(asked)
        limit = asked.max_completion_tokens
        if limit is None:
            limit = fields.get("max_tokens")
            # Else vLLM looks at max_tokens, which warns that it is old.
            room = self._service.model.max_context
            asked.max_completion_tokens = room if limit is None else limit
        call = self._call(
            request,
            body,
            asked,
            [self._chat_prompt(asked, plain, fields)],
            partial(
                sampling_options,
                asked,
                max_tokens=limit,
                logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            ),
        )
        return await _answer(call, lambda: self._chats.create_chat_completion(asked))

    async def tokenize(self, request: Request) -> Response:
        body = bodies.parsed(await request.body())
        fields = bodies.check_fields(body, _TOKENIZE, {})
        self._check_model(fields)
        prompt: Prompt
        if "messages" in fields:
            plain = bodies.plain_chat(fields["messages"])
            if plain is None:
                raise InvalidArgument("messages", "other content", "messages of text alone")
            prompt = plain
        elif isinstance(text := fields.get("prompt"), str):
            prompt = TextPrompt(text)
        else:
            raise InvalidArgument("prompt", text, "a text, or else messages")
        ids, texts = await self._service.inference.tokenize(
            prompt, special_tokens=_flag(fields, "add_special_tokens", default=True)
        )
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": self._service.model.max_context,
            "tokens": ids,
            "token_strs": texts if _flag(fields, "return_token_strs", default=False) else None,
        }
        return JSONResponse(answer)

    async def detokenize(self, request: Request) -> Response:
        body = bodies.parsed(await request.body())
        fields = bodies.check_fields(body, _DETOKENIZE, {})
        self._check_model(fields)
        tokens = fields.get("tokens")
        if not isinstance(tokens, list):
            raise InvalidArgument("tokens", tokens, "a list of token ids")
        ids = bodies.token_ids(tokens, "tokens")
        return JSONResponse({"prompt": await self._service.inference.detokenize(ids)})

    def _call(
        self,
        request: Request,
        body: Mapping[str, Any],
        asked: CompletionRequest | ChatCompletionRequest,
        prompts: list[TextPrompt | TokenPrompt] | list[ChatPrompt | RenderedPrompt],
        sampling: Callable[[int], Any],
        *,
        echo: bool = False,
    ) -> Call:
        """Return the call, checked as far as that can be done before it is admitted."""
        num_choices = 1 if asked.n is None else asked.n
        if not 1 <= num_choices <= MAX_COMPLETIONS:
            raise InvalidArgument("n", num_choices, f"1 to {MAX_COMPLETIONS}")
        if num_choices > 1 and asked.temperature is not None and 0 <= asked.temperature < _GREEDY:
            # vLLM's serving classes refuse it, too, without a field.
            raise InvalidArgument("n", num_choices, "1 with temperature 0: all would be the same")
        if num_choices * len(prompts) > bodies.MAX_CHOICES:
            allowed = f"at most {bodies.MAX_CHOICES} choices of all prompts together"
            raise InvalidArgument("n", f"{num_choices} for each of {len(prompts)} prompts", allowed)
        model = asked.model or self._service.model_name
        header = request.headers.get(HEADER)
        call = Call(
            record=current_call(),
            model=model,
            depths=depths_asked(body, header, model, self._service.model_name),
            prompts=prompts,
            num_choices=num_choices,
            is_stream=bool(asked.stream),
            echo=echo,
            cache_salt=asked.cache_salt or "",
            sampling=sampling,
            request_id=str(body.get("request_id") or ""),
        )
        asked.request_id = call.response_id
        self._service.policy.resolve(*call.depths)
        call.record.begin(call.generation(0, 0))
        call.record.request_id, call.record.is_stream = call.response_id, call.is_stream
        set_current(call)
        return call

    def _chat_prompt(
        self,
        asked: ChatCompletionRequest,
        plain: ChatPrompt | None,
        fields: Mapping[str, Any],
    ) -> ChatPrompt | RenderedPrompt:
        options = (
            "tools", "chat_template_kwargs", "documents", "reasoning_effort",
            "add_generation_prompt", "continue_final_message",
        )  # fmt: skip
        if plain is not None and not any(name in fields for name in options):
            return plain
        if plain is not None:
            asked.messages = [dict(message) for message in plain.messages]
        return self._chats.rendered(asked)

    def _check_model(self, fields: Mapping[str, Any]) -> None:
        model = fields.get("model", "")
        if not isinstance(model, str):
            raise InvalidArgument("model", model, "the name of the model")
        depths_asked({}, None, model, self._service.model_name)


async def _answer(call: Call, create: Callable[[], Awaitable[Any]]) -> Response:
    """Return the answer that vLLM's classes make; a stream, from its first event on."""
    with _vllms_refusals():
        result = await create()
    if isinstance(result, ErrorResponse):
        raise InvalidArgument(result.error.param or "request", None, result.error.message)
    if not isinstance(result, AsyncGenerator):
        answer = result.model_dump()
        answer["fathom"] = _served(call)
        return JSONResponse(answer, headers=_headers(call))
    # The status waits for the first event, so that a refusal has a status of its own.
    first = json.loads((await anext(result)).removeprefix("data: "))
    if "error" in first:
        await result.aclose()
        raise call.error or RuntimeError(first["error"]["message"])
    first["fathom"] = _served(call)
    return StreamingResponse(
        _events(f"data: {json.dumps(first)}\n\n", result),
        media_type="text/event-stream",
        headers={**_headers(call), "cache-control": "no-cache", "x-accel-buffering": "no"},
    )


async def _events(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _served(call: Call) -> dict[str, Any]:
    """Return the depth that was served; that of each choice where they differ."""
    first, *others = [call.served[key] for key in sorted(call.served)]
    served = _depths(first)
    if any(other != first for other in others):
        served["choices"] = [_depths(each) for each in (first, *others)]
    return served


def _depths(served: ServedDepth) -> dict[str, Any]:
    return {
        "prefill_layers": served.prefill_layers,
        "decode_layers": served.decode_layers,
        "reason": served.reason.value,
    }


def _headers(call: Call) -> dict[str, str]:
    served = call.served[min(call.served)]
    return {
        HEADER: f"{served.prefill_layers}/{served.decode_layers}",
        f"{HEADER}-reason": served.reason.value,
        "x-request-id": call.response_id,
    }


@contextmanager
def _vllms_refusals() -> Iterator[None]:
    """Turn what vLLM refuses into the service's own errors."""
    try:
        yield
    except Refused as error:
        raise error.error from error
    except (VLLMClientError, ValueError) as error:
        field = getattr(error, "parameter", None) or "request"
        raise InvalidArgument(field, getattr(error, "value", None), str(error)[:500]) from error


def _validated(model: type[M], fields: Mapping[str, Any]) -> M:
    """Return vLLM's form of a request; raise :class:`InvalidArgument` for what it cannot hold."""
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        parts = [str(part) for part in problem["loc"]]
        field = parts[0] if parts else "request"
        allowed = f"{problem['msg'][:300]}{' at ' + '.'.join(parts[1:]) if parts[1:] else ''}"
        raise InvalidArgument(field, problem["input"], allowed) from None
    except VLLMClientError as error:
        field = getattr(error, "parameter", None) or "request"
        raise InvalidArgument(field, getattr(error, "value", None), str(error)[:500]) from error
    except (TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
        # vLLM looks at fields before their types are checked.
        allowed = f"fields of the types in OpenAI's API ({str(error)[:300]})"
        raise InvalidArgument("request", "fields of other types", allowed) from error


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field.default for name, field in model.model_fields.items()}


def _flag(fields: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise InvalidArgument(name, value, "true, false")
    return value
