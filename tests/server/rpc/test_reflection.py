"""Server reflection, as clients of either version use it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_tools import protoc

from server.rpc.generated.fathom.v1 import inference_pb2
from server.rpc.server import CONTROL, INFERENCE
from tests.server.rpc.conftest import Deployment

V1 = "grpc.reflection.v1.ServerReflection"
V1ALPHA = "grpc.reflection.v1alpha.ServerReflection"

# What clients are told of the protocol, https://github.com/grpc/grpc-proto, in as many fields as
# the tests use.
V1_PROTOCOL = """
syntax = "proto3";
package grpc.reflection.v1;
service ServerReflection {
  rpc ServerReflectionInfo(stream ServerReflectionRequest)
      returns (stream ServerReflectionResponse);
}
message ServerReflectionRequest {
  string host = 1;
  oneof message_request {
    string file_by_filename = 3;
    string file_containing_symbol = 4;
    string list_services = 7;
  }
}
message ServerReflectionResponse {
  string valid_host = 1;
  ServerReflectionRequest original_request = 2;
  oneof message_response {
    FileDescriptorResponse file_descriptor_response = 4;
    ListServiceResponse list_services_response = 6;
    ErrorResponse error_response = 7;
  }
}
message FileDescriptorResponse { repeated bytes file_descriptor_proto = 1; }
message ListServiceResponse { repeated ServiceResponse service = 1; }
message ServiceResponse { string name = 1; }
message ErrorResponse { int32 error_code = 1; string error_message = 2; }
"""


@pytest.fixture(scope="module")
def v1_messages(tmp_path_factory: pytest.TempPathFactory) -> tuple[type[Any], type[Any]]:
    """Request and response of the protocol, compiled from its own text."""
    directory = tmp_path_factory.mktemp("reflection")
    (directory / "v1.proto").write_text(V1_PROTOCOL)
    compiled = directory / "compiled"
    options = [f"--proto_path={directory}", f"--descriptor_set_out={compiled}", "v1.proto"]
    assert protoc.main(["protoc", *options]) == 0
    pool = pool_of(descriptor_pb2.FileDescriptorSet.FromString(Path(compiled).read_bytes()).file)
    request, response = (
        GetMessageClass(pool.FindMessageTypeByName(f"grpc.reflection.v1.ServerReflection{name}"))
        for name in ("Request", "Response")
    )
    return request, response


def pool_of(files: Any) -> DescriptorPool:
    """Return a pool of files that come in any order."""
    pool = DescriptorPool()
    waiting = {file.name: file for file in files}

    def add(name: str) -> None:
        file = waiting.pop(name, None)
        if file is not None:
            for dependency in file.dependency:
                add(dependency)
            pool.AddSerializedFile(file.SerializeToString())

    for name in list(waiting):
        add(name)
    return pool


async def ask_v1(
    deployment: Deployment, v1_messages: tuple[type[Any], type[Any]], **questions: str
) -> list[Any]:
    """Ask everything on one stream of the v1 service; return the answers in order."""
    request, response = v1_messages
    async with grpc.aio.insecure_channel(deployment.address) as channel:
        reflect = channel.stream_stream(
            f"/{V1}/ServerReflectionInfo",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        requests = [request(**{name: value}) for name, value in questions.items()]
        return [answer async for answer in reflect(iter(requests))]


async def test_a_client_of_v1_finds_all_services(
    deployment: Deployment, v1_messages: tuple[type[Any], type[Any]]
) -> None:
    listed, described = await ask_v1(
        deployment, v1_messages, list_services="", file_containing_symbol=INFERENCE
    )
    names = [service.name for service in listed.list_services_response.service]
    assert names == sorted([INFERENCE, CONTROL, "grpc.health.v1.Health", V1, V1ALPHA])
    assert described.original_request.file_containing_symbol == INFERENCE
    pool = pool_of(
        map(
            descriptor_pb2.FileDescriptorProto.FromString,
            described.file_descriptor_response.file_descriptor_proto,
        )
    )
    seen = pool.FindMessageTypeByName("fathom.v1.GenerateRequest")
    expected = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
    assert set(seen.fields_by_name) == set(expected)


@pytest.mark.parametrize("name", [V1, V1ALPHA])
async def test_reflection_describes_itself(
    deployment: Deployment, v1_messages: tuple[type[Any], type[Any]], name: str
) -> None:
    (answer,) = await ask_v1(deployment, v1_messages, file_containing_symbol=name)
    files = answer.file_descriptor_response.file_descriptor_proto
    service = pool_of(map(descriptor_pb2.FileDescriptorProto.FromString, files)).FindServiceByName(
        name
    )
    method = service.methods_by_name["ServerReflectionInfo"]
    package = name.rpartition(".")[0]
    assert method.input_type.full_name == f"{package}.ServerReflectionRequest"
    assert method.output_type.full_name == f"{package}.ServerReflectionResponse"
    known, answered = v1_messages[1].DESCRIPTOR, method.output_type
    assert {field.name: field.number for field in known.fields}.items() <= {
        field.name: field.number for field in answered.fields
    }.items()


async def test_an_unknown_name_is_an_answer(
    deployment: Deployment, v1_messages: tuple[type[Any], type[Any]]
) -> None:
    (answer,) = await ask_v1(deployment, v1_messages, file_containing_symbol="fathom.v1.Nothing")
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_a_client_of_v1alpha_finds_all_it_needs_to_call(deployment: Deployment) -> None:
    # The client of reflection is synchronous, and the server runs on the loop of this test.
    def discover() -> tuple[list[str], DescriptorPool]:
        with grpc.insecure_channel(deployment.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = DescriptorPool(database)
            for name in database.get_services():
                pool.FindServiceByName(name)
            return list(database.get_services()), pool

    names, pool = await asyncio.to_thread(discover)
    assert {INFERENCE, CONTROL, "grpc.health.v1.Health"} <= set(names)
    inference = pool.FindServiceByName(INFERENCE)
    assert set(inference.methods_by_name) == {
        "Generate",
        "GenerateStream",
        "Score",
        "Tokenize",
        "GetModel",
    }
    assert set(pool.FindServiceByName(CONTROL).methods_by_name) == {
        "GetPlan",
        "Calibrate",
        "SetLevels",
        "SetPolicy",
        "GetStatus",
        "Drain",
        "Resume",
    }
    seen = pool.FindMessageTypeByName("fathom.v1.GenerateRequest")
    expected = inference_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
    assert set(seen.fields_by_name) == set(expected)
