"""Prompts of the operator's page, over HTTP, with a toy engine behind them."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.access.authenticator import Authenticator
from server.access.clients import load_clients
from server.calls.call_record import CallRecord
from server.config import load_settings
from server.page_prompts import PagePrompts
from server.telemetry import prompt_box
from server.telemetry.http_pages import Probes
from server.telemetry.metrics_server import MetricsServer
from server.telemetry.prompt_box import PromptBox
from tests.server.rpc.conftest import Deployment
from tests.server.rpc.credentials import ALICE, NOBODY, OPS
from tests.server.rpc.test_inference import PROMPT_IDS, selection
from tests.server.rpc.toy_engine import expected_tokens

ASKED = {"prompt": "Once upon a time", "depth": 4, "max_tokens": 5}
JSON = {"Content-Type": "application/json"}

Answer = tuple[int, dict[str, Any], http.client.HTTPMessage]
Send = Callable[..., Coroutine[Any, Any, Answer]]


@asynccontextmanager
async def page(
    deployment: Deployment,
    records: list[CallRecord] | None = None,
    authenticator: Authenticator | None = None,
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[Send]:
    """Yield what sends a request to /prompt and returns the status, the answer and the headers."""
    observers = [] if records is None else [records.append]
    prompts = PagePrompts(deployment.service, authenticator or Authenticator(), observers)
    probes = Probes()
    probes.prompt_box = PromptBox(probes.loop, prompts.backend(load_settings(settings or {})))
    server = MetricsServer(deployment.metrics, "127.0.0.1", 0, probes)

    def send(
        asked: object = ASKED, method: str = "POST", body: bytes | None = None, **headers: str
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        try:
            if method == "POST" and body is None:
                body = json.dumps(asked).encode()
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, "/prompt", body, {**JSON, **named})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        assert text.endswith("\n")
        assert text.count("\n") == 1
        assert "Traceback" not in text
        assert not [name for name in response.headers if name.lower().startswith("access-control")]
        return response.status, json.loads(text), response.headers

    async def sent(*arguments: Any, **headers: Any) -> Answer:
        return await asyncio.to_thread(send, *arguments, **headers)

    try:
        yield sent
    finally:
        await asyncio.to_thread(server.close)


@pytest.mark.parametrize(("depth", "layers"), [(4, 4), (6, 6), ("fast", 4)])
async def test_a_prompt_runs_like_a_call(
    deployment: Deployment, depth: int | str, layers: int
) -> None:
    records: list[CallRecord] = []
    async with page(deployment, records) as send:
        status, answer, _ = await send({**ASKED, "depth": depth})
    expected = bytes(expected_tokens(PROMPT_IDS, selection(layers, layers), 5)).decode()
    assert (status, answer["text"], answer["layers"]) == (200, expected, layers)
    assert (answer["tokens"], answer["finish_reason"]) == (5, "length")
    assert 0 <= answer["first_token_seconds"] <= answer["seconds"]
    (record,) = records
    assert record.method == "fathom.v1.Inference/Generate"
    assert (record.code, record.depth, record.caller.client) == ("OK", str(layers), "127.0.0.1")
    assert record.num_generated_tokens == 5


async def test_what_the_page_may_ask(deployment: Deployment) -> None:
    async with page(deployment) as send:
        status, answer, _ = await send(method="GET")
    assert status == 200
    assert answer == {
        "problem": "",
        "max_tokens": 256,
        "num_layers": 8,
        "any_depth": True,
        "needs_token": False,
        "levels": [
            {"name": "dense", "layers": 8},
            {"name": "fast", "layers": 4},
            {"name": "generative", "layers": 8},
        ],
    }


@pytest.mark.parametrize(
    ("asked", "status", "error"),
    [
        ({**ASKED, "depth": 9}, 400, "depth.layers: got 9, allowed: 1 to 8"),
        ({**ASKED, "depth": 0}, 400, "depth: got 0, allowed: a number of layers, or"),
        ({**ASKED, "depth": True}, 400, "depth: got True, allowed: a number"),
        ({**ASKED, "depth": 2**40}, 400, "depth: got 1099511627776, allowed: a number"),
        ({"prompt": "x"}, 400, "depth: got None, allowed: a number"),
        ({**ASKED, "depth": "slow"}, 404, "no level 'slow'; the levels are dense, fast"),
        ({**ASKED, "prompt": ""}, 400, "prompt: got '', allowed: a text"),
        ({**ASKED, "prompt": 7}, 400, "prompt: got 7, allowed: a text"),
        ({**ASKED, "prompt": "x" * 5000}, 400, "prompt: "),
        ({**ASKED, "max_tokens": 257}, 400, "max_tokens: got 257, allowed: 1 to 256"),
        ({**ASKED, "temperature": 1}, 400, "request: got 'temperature', allowed: depth, max_"),
        ([], 400, "request: got 'list', allowed: a JSON object"),
    ],
)
async def test_what_is_wrong_is_named(
    deployment: Deployment, asked: object, status: int, error: str
) -> None:
    async with page(deployment) as send:
        found, answer, _ = await send(asked)
    assert (found, list(answer)) == (status, ["error"])
    assert answer["error"].startswith(error)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 20000])
async def test_a_body_that_is_no_json(deployment: Deployment, body: bytes) -> None:
    async with page(deployment) as send:
        status, answer, _ = await send(body=body)
    assert status == 400
    assert answer["error"] == "request: got 'another text', allowed: a JSON object"


@pytest.mark.parametrize("length", [2**16 + 1, 2**19])
async def test_a_body_that_is_too_long(deployment: Deployment, length: int) -> None:
    async with page(deployment) as send:
        status, answer, _ = await send(body=b"x" * length)
    assert status == 413
    assert answer["error"] == f"request: got {length} bytes, allowed: at most 65536 bytes"


@pytest.mark.parametrize("host", ["fathom.example:9090", "192.0.2.1", "localhost.example", ""])
async def test_a_foreign_name_of_the_server(deployment: Deployment, host: str) -> None:
    for method in ("GET", "POST"):
        async with page(deployment) as send:
            status, answer, _ = await send(method=method, Host=host)
        assert status == 403
        assert answer["error"].startswith(f"Host: got '{host}', allowed: a name of this machine")


@pytest.mark.parametrize("host", ["localhost:1234", "127.0.0.1", "[::1]:9090", "LOCALHOST"])
async def test_names_of_this_machine(deployment: Deployment, host: str) -> None:
    async with page(deployment) as send:
        status, _, _ = await send(Host=host, Origin=f"http://{host}")
    assert status == 200


@pytest.mark.parametrize(
    ("headers", "status", "field"),
    [
        ({"Origin": "http://evil.example"}, 403, "Origin"),
        ({"Origin": "null"}, 403, "Origin"),
        ({"Sec_Fetch_Site": "cross-site"}, 403, "Sec-Fetch-Site"),
        ({"Content_Type": "text/plain"}, 415, "Content-Type"),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415, "Content-Type"),
    ],
)
async def test_pages_of_other_sites(
    deployment: Deployment, headers: dict[str, str], status: int, field: str
) -> None:
    async with page(deployment) as send:
        found, answer, _ = await send(**headers)
    assert found == status
    assert answer["error"].startswith(f"{field}: ")


@pytest.mark.parametrize("method", ["PUT", "OPTIONS", "DELETE"])
async def test_other_methods(deployment: Deployment, method: str) -> None:
    async with page(deployment) as send:
        status, answer, headers = await send(method=method)
    assert (status, headers["Allow"]) == (405, "GET, POST")
    assert answer == {"error": "method: allowed: GET, POST"}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"metrics_host": "0.0.0.0"}, "prompts are off: other machines can reach this page"),
        ({"page_prompts": "never"}, "prompts are off: page_prompts is never"),
    ],
)
async def test_where_it_is_off(
    deployment: Deployment, settings: dict[str, str], problem: str
) -> None:
    async with page(deployment, settings=settings) as send:
        status, answer, _ = await send()
        assert status == 403
        assert answer["error"].startswith(problem)
        status, answer, _ = await send(method="GET")
        assert (status, list(answer)) == (200, ["problem"])
        assert answer["problem"].startswith(problem)


async def test_always_takes_any_name(deployment: Deployment) -> None:
    settings = {"page_prompts": "always", "metrics_host": "0.0.0.0"}
    async with page(deployment, settings=settings) as send:
        status, _, _ = await send(Host="fathom.example")
        assert status == 200
        status, _, _ = await send(Host="fathom.example", Origin="http://other.example")
        assert status == 403


async def test_known_clients(deployment: Deployment, clients_file: Path) -> None:
    records: list[CallRecord] = []
    async with page(deployment, records, Authenticator(load_clients(clients_file))) as send:
        _, answer, _ = await send(method="GET")
        assert answer["needs_token"]
        status, answer, headers = await send()
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert answer == {"error": "authorization: a bearer token is needed"}
        status, _, _ = await send(Authorization=f"Bearer {NOBODY}")
        assert status == 401
        status, answer, _ = await send(Authorization="Basic eDp5")
        assert status == 401
        status, answer, _ = await send(Authorization=f"Bearer {OPS}")
        assert (status, answer) == (403, {"error": "client ops lacks the permission inference"})
        status, _, _ = await send(Authorization=f"Bearer {ALICE}")
        assert status == 200
    assert [(record.caller.client, record.code) for record in records] == [
        ("127.0.0.1", "UNAUTHENTICATED"),
        ("127.0.0.1", "UNAUTHENTICATED"),
        ("ops", "PERMISSION_DENIED"),
        ("alice", "OK"),
    ]


async def test_a_server_that_starts(starting: Deployment) -> None:
    async with page(starting) as send:
        for method in ("GET", "POST"):
            status, answer, headers = await send(method=method)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert answer == {"error": "the server is starting: initializing"}


async def test_too_many_at_a_time(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_box, "_MAX_AT_A_TIME", 1)
    async with page(deployment) as send:
        deployment.engine.gate.clear()
        first = asyncio.create_task(send())
        while not deployment.service.status().load.num_running:
            await asyncio.sleep(0.01)
        status, answer, headers = await send()
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer == {"error": "1 prompts of this page run already"}
        deployment.engine.gate.set()
        status, _, _ = await first
        assert status == 200


async def test_a_deadline(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_box.BoxRequest.__init__, "__defaults__", (0.05,))
    async with page(deployment) as send:
        deployment.engine.gate.clear()
        status, answer, _ = await send()
        deployment.engine.gate.set()
    assert (status, answer) == (504, {"error": "no answer in 0.05 s"})


async def test_a_mistake_of_the_server(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(deployment.service.inference, "generate", fail)
    async with page(deployment) as send:
        status, answer, _ = await send()
    assert (status, answer) == (500, {"error": "an error that the server logged"})
    assert "ZeroDivisionError: secret" in caplog.text
