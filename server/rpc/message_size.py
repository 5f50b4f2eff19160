"""Limits on the fields of a request, checked in its bytes before it is decoded.

A message of protobuf is a series of fields, each with a number, and a length if it is a text, a
list or a message: see https://protobuf.dev/programming-guides/encoding. Decoding more ids than a
context holds would stop the event loop meanwhile, and take a hundred times their memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from server.engine.base import ModelInfo
from server.errors import InvalidArgument

# Smaller messages are decoded at once: that takes less than a millisecond.
_SMALL_MESSAGE = 2**14
# Bytes of a field that holds no prompt.
_MAX_OTHER_BYTES = 2**16
# Messages with more fields are refused; a chat of 1024 messages has fewer.
_MAX_FIELDS = 2**13
# gRPC's own default, which leaves room for calibration texts, whatever the model is.
_LEAST_LIMIT = 2**22
# Bytes of a token's text: more than the longest tokens of common vocabularies have.
_BYTES_PER_TOKEN = 128

# Bytes of an id with its tag, as clients write them that pack nothing.
_ID_BYTES = 6
# Numbers of an id, which are its tag and itself, and of what is around all of them.
_ID_NUMBERS, _OTHER_NUMBERS = 2, 16
# Every character of UTF-8 begins with a byte that is none of these.
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
# Every number of protobuf ends with a byte that is none of these.
_INNER_BYTES = bytes(range(0x80, 0x100))
_TEXTS = frozenset({"prompt", "text", "context_text", "chat.messages.content"})
_IDS = frozenset({"token_ids", "context_ids"})
_PARTS = frozenset({"chat", "chat.messages"})


class _Malformed(Exception):
    """These bytes are no message; the decoder says why."""


def default_message_bytes(max_context: int) -> int:
    """Return the size of the largest message that a context of ``max_context`` tokens needs."""
    return min(max(_LEAST_LIMIT, _BYTES_PER_TOKEN * max_context), 2**31 - 1)


def check_size(data: bytes, message: Descriptor, model: ModelInfo) -> None:
    """Raise :class:`InvalidArgument` for a message with a field that is too long for the model.

    Any other message is small enough to be decoded at once; the service counts its tokens exactly.
    Malformed messages are left to the decoder.
    """
    if len(data) <= _SMALL_MESSAGE:
        return
    amounts: dict[str, int] = {}
    try:
        for number, (path, part) in enumerate(_fields(memoryview(data), message, "")):
            if number >= _MAX_FIELDS:
                raise InvalidArgument(
                    "request", f"more than {_MAX_FIELDS} fields", f"at most {_MAX_FIELDS}"
                )
            if path in _TEXTS:
                amounts[path] = amounts.get(path, 0) + _count_without(part, _CONTINUATION_BYTES)
                _check_text(path, amounts[path], model)
            elif path in _IDS:
                _check_ids(path, len(part), model.max_context * _ID_BYTES, "bytes", model)
                amounts[path] = amounts.get(path, 0) + _count_without(part, _INNER_BYTES)
                longest = model.max_context * _ID_NUMBERS + _OTHER_NUMBERS
                _check_ids(path, amounts[path], longest, "numbers", model)
            elif path not in _PARTS:
                amounts[path] = amounts.get(path, 0) + len(part)
                if amounts[path] > _MAX_OTHER_BYTES:
                    allowed = f"at most {_MAX_OTHER_BYTES} bytes"
                    raise InvalidArgument(path, f"{amounts[path]} bytes", allowed)
    except _Malformed:
        return


def _check_text(path: str, num_characters: int, model: ModelInfo) -> None:
    longest = model.max_context * model.max_characters_per_token
    if num_characters > longest:
        allowed = f"at most {longest} characters: the context holds {model.max_context} tokens"
        field = path.removesuffix(".content")
        raise InvalidArgument(field, f"{num_characters} characters", allowed)


def _check_ids(path: str, amount: int, most: int, unit: str, model: ModelInfo) -> None:
    if amount > most:
        longest = model.max_context - 1
        allowed = f"at most {longest} tokens: the context holds {longest + 1}"
        raise InvalidArgument(f"{path}.ids", f"{amount} {unit}", allowed)


def _count_without(data: memoryview, left_out: bytes) -> int:
    return len(bytes(data).translate(None, left_out))


def _fields(data: memoryview, message: Descriptor, prefix: str) -> Iterator[tuple[str, memoryview]]:
    """Yield path and content of each field, those of parts after the part itself."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        field: FieldDescriptor | None = message.fields_by_number.get(tag >> 3)
        path = prefix + ("(unknown)" if field is None else field.name)
        match tag & 7:
            case 0:
                _, end = _varint(data, position)
            case 1:
                end = position + 8
            case 2:
                size, position = _varint(data, position)
                end = position + size
            case 5:
                end = position + 4
            case _:  # groups, which proto3 does not have, and unknown types
                raise InvalidArgument("request", f"type {tag & 7} in {path}", "a message of proto3")
        if end > len(data):
            raise _Malformed
        yield path, data[position:end]
        if field is not None and path in _PARTS and tag & 7 == 2:
            assert field.message_type is not None
            yield from _fields(data[position:end], field.message_type, f"{path}.")
        position = end


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return the number that begins at ``position``, and where it ends."""
    value = 0
    for i in range(10):
        if position + i >= len(data):
            raise _Malformed
        byte = data[position + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, position + i + 1
    raise _Malformed
