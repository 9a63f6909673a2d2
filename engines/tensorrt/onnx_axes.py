"""Fix a symbolic axis of an ONNX file to a size by editing its bytes: the device has no `onnx` package.

TensorRT needs a static cache capacity, and a bundle keeps the capacity symbolic. ONNX files are Protocol
Buffers: a message is a sequence of (field number, wire type, payload). Only the path from the model to the
dimensions of its graph's values is decoded; everything else is copied unchanged. Field numbers are those of
onnx.proto (IR version 3 and later).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import InputError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
GRAPH, INPUT, OUTPUT, VALUE_INFO = 7, 11, 12, 13  # ModelProto.graph; GraphProto.input, .output, .value_info
# ValueInfoProto.type -> TypeProto.tensor_type -> TypeProto.Tensor.shape -> TensorShapeProto.dim
PATH = ((GRAPH,), (INPUT, OUTPUT, VALUE_INFO), (2,), (1,), (2,), (1,))
DIM_VALUE, DIM_PARAM = 1, 2  # TensorShapeProto.Dimension


def onnx_with_axis(model: bytes, *, symbol: str, size: int, where: str) -> bytes:
    """Set every axis named `symbol` of the graph's values to `size`, in the bytes of a .onnx file.

    Raises InputError when `model` is not an ONNX model.
    """
    try:
        return _edited(model, PATH, symbol.encode(), size)
    except (IndexError, ValueError) as error:
        raise InputError(
            "This ONNX file cannot be read",
            where=f"{where}: expected an ONNX model, got {error}",
            fix="copy the bundle again, or export it again",
        ) from None


def _edited(message: bytes, path: tuple[tuple[int, ...], ...], symbol: bytes, size: int) -> bytes:
    if not path:
        return _dimension(message, symbol, size)
    parts = []
    for number, wire, whole, payload in _fields(message):
        if number in path[0] and wire == BYTES:
            payload = _edited(payload, path[1:], symbol, size)
            whole = _varint(number << 3 | BYTES) + _varint(len(payload)) + payload
        parts.append(whole)
    return b"".join(parts)


def _dimension(message: bytes, symbol: bytes, size: int) -> bytes:
    named = any(number == DIM_PARAM and payload == symbol for number, _, _, payload in _fields(message))
    return _varint(DIM_VALUE << 3 | VARINT) + _varint(size) if named else message


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Yield the number, the wire type, the bytes and the payload of each field."""
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        wire = key & 7
        if wire == BYTES:
            length, begin = _read_varint(message, at)
            at = begin + length
        elif wire == VARINT:
            begin, (_, at) = at, _read_varint(message, at)
        elif wire in (FIXED32, FIXED64):
            begin, at = at, at + (4 if wire == FIXED32 else 8)
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if at > len(message):
            left = len(message) - begin
            raise ValueError(f"a field of {at - begin} bytes at byte {start}, where {left} are left")
        yield key >> 3, wire, message[start:at], message[begin:at]


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, stored as seven bits per byte, lowest first, and the position after it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
