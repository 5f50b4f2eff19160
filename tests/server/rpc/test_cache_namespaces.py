"""Callers that share a prefix cache, and those that do not."""

from __future__ import annotations

import dataclasses

import pytest

from server.engine.base import EVERYONE, CacheNamespace
from server.rpc.client import Client
from server.rpc.generated.fathom.v1 import inference_pb2
from tests.server.rpc.conftest import Deployment
from tests.server.rpc.credentials import REQUEST, Deployed, generate, written
from tests.server.rpc.secured import secured

ALICE, BOB = "token-of-alice-000", "token-of-bob-000000"


def score(client: Client) -> None:
    client.score(inference_pb2.ScoreRequest(text="Once upon"))


async def test_each_client_has_a_namespace_of_its_own(deployed: Deployed) -> None:
    """Also one whose name is the address of others."""
    text = f"alice inference {ALICE}\n127.0.0.1 inference {BOB}\n"
    files = dataclasses.replace(deployed.tls, clients=written(deployed.directory / "clients", text))
    async with secured(files) as server:
        for token in (ALICE, BOB, ALICE):
            await server.use(generate, tls=deployed.trusting, token=token)
            await server.use(score, tls=deployed.trusting, token=token)
        alice, bob = CacheNamespace("client", "alice"), CacheNamespace("client", "127.0.0.1")
        found = [request.cache_namespace for request in server.engine.requests]
        assert found == server.engine.score_namespaces == [alice, bob, alice]


async def test_anonymous_callers_share_with_those_of_their_machine(deployment: Deployment) -> None:
    await deployment.client.inference.Generate(REQUEST)
    (request,) = deployment.engine.requests
    assert request.cache_namespace == CacheNamespace("address", "127.0.0.1")


@pytest.mark.parametrize("starting", [{"share_prefix_cache": True}], indirect=True)
async def test_clients_that_trust_each_other_share(deployment: Deployment) -> None:
    await deployment.client.inference.Generate(REQUEST)
    await deployment.client.inference.Score(inference_pb2.ScoreRequest(text="Once upon"))
    (request,) = deployment.engine.requests
    assert [request.cache_namespace] == deployment.engine.score_namespaces == [EVERYONE]
