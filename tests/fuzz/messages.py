"""Turns bytes into request messages: any bytes into some message, and every message reachable."""

from __future__ import annotations

import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from server.rpc.generated.fathom.v1 import control_pb2, inference_pb2

REQUESTS: tuple[type[Message], ...] = (
    inference_pb2.GenerateRequest,
    inference_pb2.ScoreRequest,
    inference_pb2.TokenizeRequest,
    control_pb2.SetLevelsRequest,
    control_pb2.SetPolicyRequest,
    control_pb2.CalibrateRequest,
    control_pb2.DrainRequest,
)

_MAX_REPEATED = 4
_MAX_DEPTH = 4
# Numbers and words that mean something are more likely to lead somewhere than any others.
_NUMBERS = (0, 1, 2, 7, 8, 9, 255, 256, 257, 4095, 4096, 2**31 - 1, 2**32 - 1, 2**63 - 1)
_DOUBLES = (0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 2.5, 1e308, 5e-324, float("inf"), float("nan"))
_WORDS = ("", "a", "Once upon a time", "dense", "fast", "user", "nobody", "\0", "é\u202e\U0001f600")
_BITS = {
    FieldDescriptor.CPPTYPE_INT32: (32, True),
    FieldDescriptor.CPPTYPE_INT64: (64, True),
    FieldDescriptor.CPPTYPE_UINT32: (32, False),
    FieldDescriptor.CPPTYPE_UINT64: (64, False),
}


class Source:
    """Bytes that are used up; zeros once they are."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._position : self._position + count]
        self._position += count
        return taken.ljust(count, b"\0")

    def below(self, limit: int) -> int:
        return self.take(1)[0] % limit

    @property
    def is_empty(self) -> bool:
        return self._position >= len(self._data)


def request_from(data: bytes) -> Message:
    """Return the request that these bytes stand for."""
    source = Source(data)
    message = REQUESTS[source.below(len(REQUESTS))]()
    _fill(message, source, 0)
    return message


def _fill(message: Message, source: Source, depth: int) -> None:
    for field in message.DESCRIPTOR.fields:
        if source.is_empty:
            return
        if field.is_repeated:
            for _ in range(source.below(_MAX_REPEATED + 1)):
                _append(getattr(message, field.name), field, source, depth)
        elif source.below(2):
            if field.message_type is None:
                setattr(message, field.name, _value(field, source))
            elif depth < _MAX_DEPTH:
                getattr(message, field.name).SetInParent()
                _fill(getattr(message, field.name), source, depth + 1)


def _append(values: Any, field: Any, source: Source, depth: int) -> None:
    if field.message_type is None:
        values.append(_value(field, source))
    elif field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        values[_value(entry["key"], source)] = _value(entry["value"], source)
    elif depth < _MAX_DEPTH:
        _fill(values.add(), source, depth + 1)


def _value(field: Any, source: Source) -> object:
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if source.below(2):
            return _WORDS[source.below(len(_WORDS))]
        return source.take(source.below(48)).decode("utf-8", "replace")
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return bool(source.below(2))
    if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
        if source.below(2):
            return _DOUBLES[source.below(len(_DOUBLES))]
        return struct.unpack("<d", source.take(8))[0]
    bits, signed = _BITS[field.cpp_type]
    if source.below(2):
        number = _NUMBERS[source.below(len(_NUMBERS))]
        return number % 2 ** (bits - signed)
    return int.from_bytes(source.take(bits // 8), "little", signed=signed)
