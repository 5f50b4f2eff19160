"""Requests that are refused: with which status, and naming which field."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.openai.failures import FAILURES
from server.rpc.status import CODES
from tests.server.openai.conftest import HttpDeployment, until_recorded
from tests.server.openai.test_completions import PROMPT

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_codes_are_those_of_grpc() -> None:
    for kind, failure in FAILURES.items():
        if kind in CODES:
            assert failure.code == CODES[kind].name


def problem_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == response.status_code
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "status", "param", "part"),
    [
        ({"model": "other"}, 404, None, "no model 'other'; the model is toy"),
        ({"model": "toy:none"}, 404, None, "the levels are dense, fast, generative"),
        ({"model": "toy:"}, 404, None, "no model"),
        ({"model": "toy@fast"}, 404, None, "no model"),
        ({"model": "toy@99"}, 400, "depth", "1 to 8"),
        ({"model": "toy@1.5"}, 400, "depth", "less than 1"),
        ({"model": 5}, 400, "model", "string"),
        ({"depth": [1]}, 400, "depth", "a number of layers"),
        ({"depth": True}, 400, "depth", "a number of layers"),
        ({"depth": 0}, 400, "depth", "1 to 8"),
        ({"depth": "nowhere"}, 404, None, "no level 'nowhere'"),
        ({"prefill_depth": "auto"}, 404, None, "no level 'auto'"),
        ({"max_quality_loss": -1}, 400, "max_quality_loss", "0 or more"),
        ({"depth": 4, "max_quality_loss": 1}, 400, "max_quality_loss", "auto"),
        ({"prompt": ""}, 400, "prompt", "at least one token"),
        ({"prompt": []}, 400, "prompt", "a text, token ids"),
        ({"prompt": None}, 400, "prompt", "a text, token ids"),
        ({"prompt": [1, "a"]}, 400, "prompt[1]", "a token id"),
        ({"prompt": ["a", 1]}, 400, "prompt[1]", "a text, or token ids"),
        ({"prompt": [True]}, 400, "prompt[0]", "a token id"),
        ({"prompt": [999]}, 400, "prompt[0]", "0 to 257"),
        ({"prompt": [-1]}, 400, "prompt[0]", "0 to 257"),
        ({"prompt": ["a"] * 257}, 400, "prompt", "at most 256 prompts"),
        ({"prompt": ["a"] * 100, "n": 3}, 400, "n", "at most 256 choices"),
        ({"n": 129}, 400, "n", "1 to 128"),
        ({"n": 0}, 400, "n", "1 to 128"),
        ({"n": 2, "temperature": 0}, 400, "n", "1 with temperature 0"),
        ({"prompt": "x" * 5000}, 400, "prompt", "at most 4096 characters"),
        ({"temperature": -1}, 400, "temperature", "non-negative"),
        ({"temperature": "hot"}, 400, "temperature", "number"),
        ({"top_p": 2}, 400, "top_p", ""),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"max_tokens": -5}, 400, "max_tokens", "at least 1"),
        ({"logprobs": 21}, 400, "logprobs", "0 to 20"),
        ({"logprobs": -1}, 400, "logprobs", ""),
        ({"seed": -1}, 400, "seed", "0 to"),
        ({"stop": ["a"] * 17}, 400, "stop", "at most 16"),
        ({"stop": "a" * 257}, 400, "stop", "1 to 256 characters"),
        ({"stop_token_ids": [999]}, 400, "stop_token_ids[0]", "0 to 257"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias", "token ids"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias[5]", "-100 to 100"),
        ({"logit_bias": {"999": 1}}, 400, "logit_bias", "0 to 257"),
        ({"allowed_token_ids": []}, 400, "allowed_token_ids", "at least one"),
        ({"allowed_token_ids": [999]}, 400, "allowed_token_ids[0]", "0 to 257"),
        ({"cache_salt": "x" * 2000}, 400, "cache_salt", ""),
        ({"request_id": "x" * 200}, 400, "request_id", "at most 128"),
        ({"unknown": 1}, 400, "unknown", "no such field"),
        ({"guided_json": {}}, 400, "guided_json", "no such field"),
        ({"vllm_xargs": {"fathom": "x"}}, 400, "vllm_xargs", "does not offer it"),
        ({"kv_transfer_params": {"a": 1}}, 400, "kv_transfer_params", "does not offer it"),
        ({"use_beam_search": True}, 400, "use_beam_search", "does not offer it"),
        ({"prompt_embeds": "AAAA"}, 400, "prompt_embeds", "does not offer it"),
        ({"priority": 5}, 400, "priority", "does not offer it"),
        ({"suffix": "x"}, 400, "suffix", "does not offer it"),
        (
            {"model": "toy:generative", "echo": True, "logprobs": 1},
            400,
            "prompt_logprobs",
            "none where the prompt runs at 4 layers",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_completions(
    deployment: HttpDeployment,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    part: str,
    stream: bool,
) -> None:
    body = {"model": "toy", "prompt": PROMPT, "max_tokens": 4, "stream": stream, **fields}
    response = await deployment.post(COMPLETE, body)
    assert response.status_code == status, response.text
    problem = problem_of(response)
    assert problem["param"] == param
    assert part in problem["message"]
    record = await until_recorded(deployment)
    assert record.code in ("INVALID_ARGUMENT", "NOT_FOUND")
    assert record.http_status == status
    assert not deployment.engine.requests


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"use_beam_search": False, "suffix": None, "priority": 0, "best_of": None},
    ],
)
async def test_fields_that_change_nothing_are_taken(
    deployment: HttpDeployment, fields: dict[str, Any]
) -> None:
    response = await deployment.post(COMPLETE, {"prompt": PROMPT, "max_tokens": 2, **fields})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "Hello"}, "messages", "at least one message"),
        ({"messages": ["Hello"]}, "messages[0]", "an object"),
        ({"messages": [{"content": "Hello"}]}, "messages[0].role", "a role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "a text"),
        ({"messages": MESSAGES * 1025}, "messages", "at most 1024"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}],
                    }
                ]
            },
            "messages[0].content[0]",
            "no images",
        ),
        ({"messages": [{**MESSAGES[0], "audio": "x"}]}, "messages[0].audio", "tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]},
            "messages[0].tool_calls",
            "at most 128",
        ),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "does not offer it"),
        (
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            "chat_template_kwargs.chat_template",
            "the model's own",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools",
            "the server's setting tool_parser",
        ),
        ({"echo": True}, "echo", "does not offer it"),
        ({"n": 129}, "n", "1 to 128"),
        ({"n": 2, "temperature": 0}, "n", "1 with temperature 0"),
        ({"top_logprobs": 5}, "top_logprobs", ""),
        ({"max_completion_tokens": 0}, "max_tokens", "at least 1"),
    ],
)
async def test_chats(
    deployment: HttpDeployment, fields: dict[str, Any], param: str, part: str
) -> None:
    response = await deployment.post(CHAT, {"messages": MESSAGES, **fields})
    assert response.status_code == 400, response.text
    problem = problem_of(response)
    assert problem["param"] == param, problem
    assert part in problem["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "other": 1}, "other"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [258]}, "prompt[0]"),
        ("/detokenize", {"tokens": [1] * 5000}, "prompt"),
    ],
)
async def test_tokens(
    deployment: HttpDeployment, path: str, body: dict[str, Any], param: str
) -> None:
    response = await deployment.post(path, body)
    assert response.status_code == 400, response.text
    assert problem_of(response)["param"] == param


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b'{"prompt": NaN}',
        b'{"temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}",
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
    ids=range(9),
)
async def test_bodies_that_are_no_json_object(deployment: HttpDeployment, data: bytes) -> None:
    headers = {"content-type": "application/json"}
    async with deployment.raw() as client:
        response = await client.post(COMPLETE, content=data, headers=headers)
    assert response.status_code == 400, response.text
    assert problem_of(response)["param"] == "body"


async def test_a_body_of_another_type(deployment: HttpDeployment) -> None:
    async with deployment.raw() as client:
        response = await client.post(
            COMPLETE, content=b"{}", headers={"content-type": "text/plain"}
        )
    assert response.status_code == 415
    assert problem_of(response)["message"] == "content-type: allowed: application/json"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large(deployment: HttpDeployment, chunked: bool) -> None:
    async def pieces() -> Any:
        for _ in range(64):
            yield b" " * 2**15

    async with deployment.raw() as client:
        content: Any = pieces() if chunked else b" " * 2**21
        response = await client.post(
            COMPLETE, content=content, headers={"content-type": "application/json"}
        )
    assert response.status_code == 413
    assert "allowed: 1048576" in problem_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/metrics", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("POST", "/inference/v1/generate", 404),
    ],
)
async def test_other_paths(deployment: HttpDeployment, method: str, path: str, status: int) -> None:
    async with deployment.raw() as client:
        response = await client.request(
            method, path, headers={"content-type": "application/json"}, content=b"{}"
        )
    assert response.status_code == status
    problem_of(response)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from(
    [
        "model", "prompt", "messages", "echo", "n", "logprobs", "top_logprobs", "max_tokens",
        "max_completion_tokens", "stream", "stream_options", "stop", "stop_token_ids", "seed",
        "temperature", "top_p", "top_k", "min_p", "logit_bias", "bad_words", "allowed_token_ids",
        "response_format", "structured_outputs", "tools", "tool_choice", "depth", "prefill_depth",
        "max_quality_loss", "cache_salt", "request_id", "add_special_tokens", "min_tokens",
        "prompt_logprobs", "skip_special_tokens", "chat_template_kwargs", "documents",
        "reasoning_effort", "continue_final_message", "parallel_tool_calls", "return_token_ids",
        "use_beam_search", "vllm_xargs", "kv_transfer_params", "suffix", "repetition_penalty",
    ]
)  # fmt: skip


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(FIELDS, JSON, max_size=4), st.sampled_from([COMPLETE, CHAT]))
async def test_no_body_is_a_fault_of_the_server(
    deployment: HttpDeployment, body: dict[str, Any], path: str
) -> None:
    body = {"prompt" if path == COMPLETE else "messages": PROMPT, "max_tokens": 2, **body}
    if path == CHAT and body["messages"] == PROMPT:
        body["messages"] = MESSAGES
    async with deployment.raw() as client:
        response = await client.post(
            path,
            content=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
    assert response.status_code in (200, 400, 404), (body, response.text)
