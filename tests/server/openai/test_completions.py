"""Completions and chats by the real client, with a toy engine behind the server."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.base import LayerSelection
from tests.server.openai.conftest import HttpDeployment, until_recorded
from tests.server.rpc.conftest import make_plan
from tests.server.rpc.toy_engine import BOS, expected_tokens, logprob

PROMPT = "Once upon a time"
PROMPT_IDS = [BOS, *PROMPT.encode()]


def selection(prefill: int, decode: int) -> LayerSelection:
    plan = make_plan()
    return LayerSelection(tuple(sorted(plan.skipped(prefill))), tuple(sorted(plan.skipped(decode))))


def text_at(prefill: int, decode: int, num_tokens: int, ids: list[int] = PROMPT_IDS) -> str:
    return bytes(expected_tokens(ids, selection(prefill, decode), num_tokens)).decode()


def asked(**fields: Any) -> dict[str, Any]:
    extra = {"ignore_eos": True, **fields.pop("extra_body", {})}
    return {"model": "toy", "prompt": PROMPT, "max_tokens": 8, "extra_body": extra, **fields}


@pytest.mark.parametrize(
    ("model", "prefill", "decode", "reason"),
    [
        ("toy", 8, 8, "default"),
        ("toy:dense", 8, 8, "requested"),
        ("toy:fast", 4, 4, "requested"),
        ("toy:generative", 4, 8, "requested"),
        ("toy:auto", 8, 8, "auto"),
        ("toy@5", 5, 5, "requested"),
        ("toy@6/3", 6, 3, "requested"),
        ("toy@0.25", 6, 6, "requested"),
        ("toy@8/.5", 8, 4, "requested"),
    ],
)
async def test_depth_by_the_name_of_the_model(
    deployment: HttpDeployment, model: str, prefill: int, decode: int, reason: str
) -> None:
    async with deployment.openai() as client:
        raw = await client.completions.with_raw_response.create(**asked(model=model))
    answer = raw.parse()
    assert answer.choices[0].text == text_at(prefill, decode, 8)
    assert answer.model == model
    assert answer.model_extra == {
        **(answer.model_extra or {}),
        "fathom": {"prefill_layers": prefill, "decode_layers": decode, "reason": reason},
    }
    assert raw.headers["x-fathom-depth"] == f"{prefill}/{decode}"
    assert raw.headers["x-fathom-depth-reason"] == reason
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(PROMPT_IDS), 8)
    record = await until_recorded(deployment)
    assert (record.method, record.code, record.http_status) == ("POST /v1/completions", "OK", 200)
    assert (record.num_prompt_tokens, record.num_generated_tokens) == (len(PROMPT_IDS), 8)
    assert record.depth == str(decode)


@pytest.mark.parametrize(
    ("fields", "header", "prefill", "decode"),
    [
        ({"depth": 5}, None, 5, 5),
        ({"depth": "5"}, None, 5, 5),
        ({"depth": 0.5}, None, 4, 4),
        ({"depth": "fast"}, None, 4, 4),
        ({"depth": "6/3"}, None, 6, 3),
        ({"depth": 3, "prefill_depth": 6}, None, 6, 3),
        ({"prefill_depth": 6}, None, 6, 8),
        ({"depth": 3, "prefill_depth": "dense"}, None, 8, 3),
        ({}, "fast", 4, 4),
        ({}, "7/2", 7, 2),
        ({"depth": 5}, "fast", 5, 5),
        ({"max_quality_loss": 0.0}, None, 8, 8),
        ({"depth": "auto", "max_quality_loss": 9}, None, 8, 8),
    ],
)
async def test_depth_by_field_and_header(
    deployment: HttpDeployment,
    fields: dict[str, object],
    header: str | None,
    prefill: int,
    decode: int,
) -> None:
    headers = {} if header is None else {"x-fathom-depth": header}
    async with deployment.openai() as client:
        answer = await client.completions.create(
            **asked(model="toy:fast" if header else "toy", extra_body=fields), extra_headers=headers
        )
    assert answer.choices[0].text == text_at(prefill, decode, 8)
    (request,) = deployment.engine.requests
    assert request.layers == selection(prefill, decode)


async def test_a_stream_says_what_is_served_and_ends_with_the_usage(
    deployment: HttpDeployment,
) -> None:
    async with deployment.openai() as client:
        raw = await client.completions.with_raw_response.create(
            **asked(model="toy:fast", stream=True, stream_options={"include_usage": True})
        )
        chunks = [chunk async for chunk in raw.parse()]
    assert raw.headers["x-fathom-depth"] == "4/4"
    assert (chunks[0].model_extra or {})["fathom"]["decode_layers"] == 4
    assert "".join(choice.text for c in chunks for choice in c.choices) == text_at(4, 4, 8)
    assert [choice.finish_reason for c in chunks for choice in c.choices][-1] == "length"
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT_IDS), 8)
    assert (await until_recorded(deployment)).is_stream


async def test_several_prompts_and_choices(deployment: HttpDeployment) -> None:
    prompts = ["Once", "Then"]
    ids = [[BOS, *prompt.encode()] for prompt in prompts]
    async with deployment.openai() as client:
        whole = await client.completions.create(**asked(prompt=prompts, n=2, seed=7))
        stream = await client.completions.create(**asked(prompt=ids, n=2, seed=7, stream=True))
        texts: dict[int, str] = {}
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
    expected = [text_at(8, 8, 8, prompt) for prompt in ids for _ in range(2)]
    assert [choice.text for choice in whole.choices] == expected
    assert [texts[i] for i in range(4)] == expected
    seeds = [request.sampling.seed for request in deployment.engine.requests]
    assert sorted(seeds[:4], key=str) == [7, 7, 8, 8], "each choice has a seed of its own"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (10, 32)
    assert (await until_recorded(deployment)).num_prompt_tokens == 10


async def test_log_probabilities_and_an_echo(deployment: HttpDeployment) -> None:
    async with deployment.openai() as client:
        answer = await client.completions.create(**asked(echo=True, max_tokens=2))
        scored = await client.completions.create(**asked(logprobs=2, max_tokens=3))
    assert answer.choices[0].text == PROMPT + text_at(8, 8, 2)
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    ids = expected_tokens(PROMPT_IDS, selection(8, 8), 3)
    assert logprobs.tokens == [chr(i) for i in ids]
    assert logprobs.token_logprobs == [
        logprob([*PROMPT_IDS, *ids[:i]], ids[i], selection(8, 8)) for i in range(3)
    ]
    assert logprobs.top_logprobs is not None
    assert all(top.keys() >= {"a", "b"} for top in logprobs.top_logprobs)


@pytest.mark.parametrize(
    "content", ["Hello", [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]]
)
async def test_chats(deployment: HttpDeployment, content: Any) -> None:
    text = "Hello" if isinstance(content, str) else "Hel\nlo"
    ids = [BOS, *f"user:{text}\n".encode()]
    messages: Any = [{"role": "user", "content": content}]
    async with deployment.openai() as client:
        options: Any = {"model": "toy@5", "messages": messages, "max_completion_tokens": 6}
        options["extra_body"] = {"ignore_eos": True}
        whole = await client.chat.completions.create(**options, logprobs=True, top_logprobs=1)
        stream = await client.chat.completions.create(**options, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert whole.choices[0].message.content == text_at(5, 5, 6, ids) == "".join(parts)
    assert whole.choices[0].message.role == "assistant"
    scores = whole.choices[0].logprobs
    assert scores is not None
    assert scores.content is not None
    assert len(scores.content) == 6
    assert (await until_recorded(deployment)).is_chat


async def test_the_models_are_the_levels_with_what_was_measured(deployment: HttpDeployment) -> None:
    async with deployment.openai() as client:
        models = (await client.models.list()).data
        one = await client.models.retrieve("toy:fast")
    names = ["toy", "toy:dense", "toy:fast", "toy:generative", "toy:auto"]
    assert [model.id for model in models] == names
    assert one == models[2]
    about = (one.model_extra or {})["fathom"]
    assert about["decode_layers"] == 4
    assert about["num_layers"] == 8
    assert {"perplexity", "quality_loss", "agreement", "tokens_per_second", "speedup"} <= set(about)


async def test_tokens_of_texts_and_texts_of_tokens(deployment: HttpDeployment) -> None:
    made = await deployment.post("/tokenize", {"model": "toy", "prompt": PROMPT})
    assert made.json() == {
        "count": len(PROMPT_IDS),
        "max_model_len": 4096,
        "tokens": PROMPT_IDS,
        "token_strs": None,
    }
    named = await deployment.post(
        "/tokenize", {"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}
    )
    assert named.json()["token_strs"] == ["a", "b"]
    chat = await deployment.post("/tokenize", {"messages": [{"role": "user", "content": "ab"}]})
    assert chat.json()["tokens"] == [BOS, *b"user:ab\n"]
    back = await deployment.post("/detokenize", {"tokens": PROMPT_IDS})
    assert back.json() == {"prompt": PROMPT}


async def test_a_prompt_without_special_tokens(deployment: HttpDeployment) -> None:
    async with deployment.openai() as client:
        await client.completions.create(**asked(extra_body={"add_special_tokens": False}))
    assert list(deployment.engine.requests[0].prompt_ids) == list(PROMPT.encode())
