"""A server with an unmodified vLLM engine for each level."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice

import openai
import psutil
import pytest

from server.rpc.client import Client
from server.rpc.generated.fathom.v1 import common_pb2, control_pb2
from tests.e2e.calls import LONG, Streamed, failure, greedy_request, requested
from tests.e2e.running_server import PATIENCE, RunningServer, running_server, until
from tests.fathom_command import free_ports

PROMPTS = ("The list", "Return the", "class")
EAGER = json.dumps({"enforce_eager": True})


@pytest.fixture(scope="module")
def server(
    demo_server: RunningServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """It finds the plan of the elastic server: both leave out the same layers."""
    directory = tmp_path_factory.mktemp("dedicated")
    (http_port,) = free_ports(1)
    with running_server(
        directory,
        http_port=http_port,
        state_dir=demo_server.copy_state(directory),
        engine="dedicated",
        levels="full=16,half=8",
        engine_args=EAGER,
    ) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with server.client() as client:
        yield client


def levels(**depths: int) -> control_pb2.SetLevelsRequest:
    request = control_pb2.SetLevelsRequest()
    for name, depth in depths.items():
        request.levels.add(name=name).depth.layers = depth
    return request


def test_tokens_are_those_of_the_elastic_engine(client: Client, demo_client: Client) -> None:
    assert client.get_plan().plan == demo_client.get_plan().plan
    for depth in (16, 8):
        for prompt in PROMPTS:
            request = greedy_request(prompt, 48, depth=depth)
            answer = client.generate(request)
            assert answer.token_ids == demo_client.generate(request).token_ids
            assert answer.served == requested(depth, depth)


def test_http_serves_the_depths_that_grpc_does(server: RunningServer, client: Client) -> None:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.http_port}/v1",
        api_key="none",
        max_retries=0,
        timeout=PATIENCE,
    ) as http:
        asked = {"prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0}
        for name, depth in (("fathom-demo:full", 16), ("fathom-demo:half", 8)):
            completion = http.completions.create(model=name, **asked)  # type: ignore[call-overload]
            expected = client.generate(greedy_request(PROMPTS[0], 24, depth=depth))
            assert completion.choices[0].text == expected.text
            assert (completion.model_extra or {})["fathom"]["decode_layers"] == depth
        with pytest.raises(openai.BadRequestError, match="allowed: the depth of a level"):
            http.completions.create(model="fathom-demo@12", **asked)  # type: ignore[call-overload]
        choice = http.completions.create(
            model="fathom-demo:half",
            prompt=PROMPTS[0],
            max_tokens=8,
            extra_body={"structured_outputs": {"choice": ["list", "tuple"]}},
        ).choices[0]
        assert choice.text in ("list", "tuple")


def test_probes_are_those_of_the_elastic_engine(client: Client, demo_client: Client) -> None:
    elastic = {level.decode_layers: level for level in demo_client.get_model().levels}
    for level in client.get_model().levels:
        other = elastic[level.decode_layers]
        assert level.choosing == other.choosing
        for name in ("perplexity", "dense_perplexity", "ratio", "ratio_stderr"):
            value = getattr(level.writing, name)
            assert value == pytest.approx(getattr(other.writing, name), rel=1e-3)
        for name in ("repeated_share", "dense_repeated_share", "first_token_changed"):
            assert getattr(level.writing, name) == getattr(other.writing, name)


def test_the_levels_are_all_there_is(client: Client, demo_client: Client) -> None:
    model = client.get_model()
    assert model.engine == "dedicated"
    assert [(level.name, level.decode_layers) for level in model.levels] == [
        ("full", 16),
        ("half", 8),
    ]
    assert [depth.decode_layers for depth in model.depths] == [16, 8]
    elastic = {level.decode_layers: level.quality for level in demo_client.get_model().depths}
    for level in model.levels:
        quality, other = level.quality, elastic[level.decode_layers]
        assert quality.num_tokens == other.num_tokens
        assert quality.perplexity == pytest.approx(other.perplexity, rel=1e-4)
        assert quality.agreement == other.agreement
        assert not quality.HasField("kl_nats")
        assert level.speed.tokens_per_second > 0


def test_other_depths_are_refused(client: Client) -> None:
    error = failure(lambda: client.generate(greedy_request("The", 2, depth=12)))
    assert (error.code, error.message) == (
        "INVALID_ARGUMENT",
        "depth.layers: got 12, allowed: the depth of a level: 16 (full), 8 (half)",
    )
    request = greedy_request("The", 2)
    request.depth.prune_ratio = 0.25
    error = failure(lambda: client.generate(request))
    assert error.message.startswith("depth.prune_ratio: got 0.25, allowed: the depth of a level")
    error = failure(lambda: client.generate(greedy_request("The", 2, depth=16, prefill_depth=8)))
    assert error.code == "INVALID_ARGUMENT"
    assert error.message.startswith("prefill_depth: got 8, allowed: 16 layers")
    split = levels(full=16)
    split.levels[0].prefill_depth.layers = 8
    error = failure(lambda: client.set_levels(split))
    assert error.code == "INVALID_ARGUMENT"
    assert error.message.startswith("levels.full.prefill_depth: got 8, allowed: 16, its depth")


def test_metrics_of_all_engines_are_there(server: RunningServer) -> None:
    scrape = server.scrape()
    assert set(scrape.by_label("vllm:num_requests_running", "depth")) == {"16", "8"}
    tokens = scrape.by_label("vllm:generation_tokens_total", "depth")
    assert min(tokens.values()) >= 48 * len(PROMPTS)
    assert scrape.by_label("fathom_level_up", "level") == {"full": 1.0, "half": 1.0}
    assert scrape.value("fathom_engine_up") == 1
    assert scrape.by_label("fathom_depth_perplexity", "depth").keys() == {"16", "8"}


def test_levels_come_and_go_beside_a_stream(
    server: RunningServer, client: Client, demo_client: Client
) -> None:
    engines = {process.pid for process in server.engine_processes()}
    request = greedy_request("The list", LONG, depth=8)
    stream = client.generate_stream(request)
    begun = list(islice(stream, 2))
    answer = client.set_levels(levels(full=16, quarter=4))
    assert [level.name for level in answer.levels] == ["full", "quarter"]
    assert all(level.HasField("quality") and level.HasField("speed") for level in answer.levels)
    # The level of the stream is gone for all others.
    assert failure(lambda: client.generate(greedy_request("The", 2, depth=8))).code == (
        "INVALID_ARGUMENT"
    )
    shallow = greedy_request("Return the", 48, depth=4)
    assert client.generate(shallow).token_ids == demo_client.generate(shallow).token_ids
    streamed = Streamed.of([*begun, *stream])
    assert streamed.token_ids == list(demo_client.generate(request).token_ids)
    until(lambda: len(server.engine_processes()) == 2, lambda: server.log)
    assert len(engines & {process.pid for process in server.engine_processes()}) == 1
    assert set(server.scrape().by_label("vllm:num_requests_running", "depth")) == {"16", "4"}


def test_a_killed_engine_takes_its_own_level_alone(server: RunningServer, client: Client) -> None:
    # The one that came last is that of the level 'quarter'.
    process = max(server.engine_processes(), key=lambda process: process.create_time())
    expected = list(client.generate(greedy_request("The list", 32, depth=16)).token_ids)
    other = client.generate_stream(greedy_request("The list", LONG, depth=16))
    begun = list(islice(other, 2))
    doomed = client.generate_stream(greedy_request("The list", LONG, depth=4))
    assert next(doomed).prompt_info.served == requested(4, 4)
    assert next(doomed).delta.token_ids
    process.kill()
    error = failure(lambda: list(doomed))
    assert (error.code, error.message) == (
        "UNAVAILABLE",
        "the engine of depth 4 has died; it is being started again",
    )
    assert failure(lambda: client.generate(greedy_request("The", 2, depth=4))).code == (
        "UNAVAILABLE"
    )
    assert server.scrape().by_label("fathom_level_up", "level") == {"full": 1.0, "quarter": 0.0}
    assert client.health() == "SERVING"
    assert client.get_status().state == control_pb2.GetStatusResponse.STATE_SERVING
    assert Streamed.of([*begun, *other]).token_ids[:32] == expected
    until(
        lambda: server.scrape().by_label("fathom_level_up", "level")["quarter"] == 1.0,
        lambda: server.log,
    )
    assert len(client.generate(greedy_request("The list", 8, depth=4)).token_ids) == 8
    assert server.scrape().value("fathom_engine_restarts_total") == 1
    assert client.get_status().num_engine_restarts == 1


def test_the_default_level_serves_requests_that_name_none(client: Client) -> None:
    answer = client.generate(greedy_request("The list", 3))
    assert answer.served == common_pb2.Served(
        prefill_layers=16, decode_layers=16, reason=common_pb2.Served.REASON_DEFAULT
    )


def test_it_ends_in_order(server: RunningServer) -> None:
    children = server.children()
    assert len(children) >= 2
    assert server.stop() == 0
    assert psutil.wait_procs(children, timeout=PATIENCE)[1] == []
