"""Server reflection, under the names of both of its versions.

``grpc.reflection.v1`` is ``grpc.reflection.v1alpha`` under another package name: methods, fields
and their numbers are the same. grpcio-reflection has v1alpha alone, so v1 is derived from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection, reflection_pb2

_V1ALPHA_PACKAGE: str = reflection_pb2.DESCRIPTOR.package
_V1_PACKAGE = "grpc.reflection.v1"
_V1_FILE = "grpc/reflection/v1/reflection.proto"
_SERVICE, _METHOD = "ServerReflection", "ServerReflectionInfo"

# The services of reflection, newest first.
SERVICE_NAMES: tuple[str, ...] = (f"{_V1_PACKAGE}.{_SERVICE}", reflection.SERVICE_NAME)


def enable_reflection(service_names: Iterable[str], server: grpc.aio.Server) -> None:
    """Let clients ask ``server`` for these services and for those of reflection itself."""
    pool = descriptor_pool.Default()
    _add_v1_descriptors(pool)
    servicer = reflection.aio.ReflectionServicer([*service_names, *SERVICE_NAMES], pool=pool)
    make_handler: Any = grpc.stream_stream_rpc_method_handler
    handler = make_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(name, {_METHOD: handler}) for name in SERVICE_NAMES
        )
    )


def _add_v1_descriptors(pool: descriptor_pool.DescriptorPool) -> None:
    """Add v1 of the protocol to ``pool``, so that reflection can describe itself."""
    try:
        pool.FindFileByName(_V1_FILE)
        return
    except KeyError:
        pass
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name, file.package = _V1_FILE, _V1_PACKAGE
    for message in file.message_type:
        for field in message.field:
            if field.HasField("type_name"):
                field.type_name = _in_v1(field.type_name)
    for service in file.service:
        for method in service.method:
            method.input_type = _in_v1(method.input_type)
            method.output_type = _in_v1(method.output_type)
    pool.AddSerializedFile(file.SerializeToString())


def _in_v1(type_name: str) -> str:
    return type_name.replace(f".{_V1ALPHA_PACKAGE}.", f".{_V1_PACKAGE}.")
