"""The bytes of an ONNX file without its weights: `raw_data` of large tensors stays in the file.

An ONNX file is one protobuf message (onnx.proto), and its weights lie in it as byte fields. Parsing
them would copy them, and every pass of onnx over the model would copy them again. So the file is
walked once as plain wire format, and what is parsed is a skeleton: the same model, its large
tensors spelled as external data that happens to lie in the model's own file.

Wire format: protobuf.dev/programming-guides/encoding. Everything else is checked by protobuf.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import ModelProto, StringStringEntryProto, TensorProto

from ..ir.errors import ModelError

LARGE = 1024
"""Bytes from which raw_data stays in the file. Shapes and axes are smaller, and stay readable."""
MAX_SKELETON = 64 << 20
MAX_DEPTH = 99
"""Of messages; protobuf's own bound is 100. A graph in a graph is three."""
AGAIN = "the file is damaged or not ONNX; export or download it again"

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

_INNER: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
"""Message -> its fields (by number) that may hold tensors, and their messages."""
_RAW_DATA = 9


@dataclass(frozen=True, slots=True)
class Field:
    """One field: [start, stop) with its tag; `value` is where the bytes of a BYTES field begin."""

    number: int
    wire: int
    start: int
    value: int
    stop: int


class Wire:
    """A mapped file read as protobuf wire format. `location` is its name beside the model."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.location = path, data, path.name
        self._size = 0

    def skeleton(self) -> bytes:
        """The model without large raw_data. Raises ModelError for damaged or oversized files."""
        pieces = self._strip("model", 0, len(self.data), 0)
        return b"".join(pieces)

    def _fail(self, at: int, what: str) -> ModelError:
        return ModelError(f"{self.path}: at byte {at}: {what}; {AGAIN}")

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        value = shift = 0
        while at < stop and shift < 70:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        raise self._fail(at, "a number runs over the end of its message")

    def _fields(self, start: int, stop: int) -> Iterator[Field]:
        at = start
        while at < stop:
            tag, value = self._varint(at, stop)
            wire = tag & 7
            if wire == VARINT:
                _, end = self._varint(value, stop)
            elif wire == BYTES:
                length, value = self._varint(value, stop)
                end = value + length
            elif wire in (FIXED32, FIXED64):
                end = value + (4 if wire == FIXED32 else 8)
            else:
                raise self._fail(at, f"wire type {wire}, expected 0, 1, 2 or 5")
            if end > stop:
                raise self._fail(at, f"field {tag >> 3} ends at {end}, its message at {stop}")
            yield Field(tag >> 3, wire, at, value, end)
            at = end

    def _strip(self, message: str, start: int, stop: int, depth: int) -> list[bytes]:
        if depth > MAX_DEPTH:
            raise self._fail(start, f"messages nested more than {MAX_DEPTH} deep")
        if message == "tensor":
            return self._tensor(start, stop)
        pieces: list[bytes] = []
        inner = _INNER[message]
        for field in self._fields(start, stop):
            kind = inner.get(field.number) if field.wire == BYTES else None
            if kind is None or field.stop - field.value < LARGE:
                pieces.append(self._copy(field))
            else:
                body = b"".join(self._strip(kind, field.value, field.stop, depth + 1))
                pieces.append(_framed(field.number, body))
        return pieces

    def _tensor(self, start: int, stop: int) -> list[bytes]:
        pieces: list[bytes] = []
        for field in self._fields(start, stop):
            length = field.stop - field.value
            if field.number == _RAW_DATA and field.wire == BYTES and length >= LARGE:
                pieces.append(self._reference(field.value, length))
            else:
                pieces.append(self._copy(field))
        return pieces

    def _copy(self, field: Field) -> bytes:
        self._size += field.stop - field.start
        if self._size > MAX_SKELETON:
            raise ModelError(
                f"{self.path}: more than {MAX_SKELETON >> 20} MiB besides raw_data of tensors; "
                "store the weights as raw_data or as external data"
            )
        return self.data[field.start : field.stop]

    def _reference(self, offset: int, length: int) -> bytes:
        place = {"location": self.location, "offset": str(offset), "length": str(length)}
        entries = [StringStringEntryProto(key=k, value=v) for k, v in place.items()]
        external = TensorProto(data_location=TensorProto.EXTERNAL, external_data=entries)
        return external.SerializeToString()


def _framed(number: int, body: bytes) -> bytes:
    return _number(number << 3 | BYTES) + _number(len(body)) + body


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def parse(path: Path, mapped: mmap.mmap) -> ModelProto:
    """The model of a mapped file, large raw_data as references. Raises ModelError."""
    proto = ModelProto()
    data = Wire(path, mapped).skeleton()
    try:
        proto.ParseFromString(data)
        texts = _has_texts_only(proto)
    except Exception as error:  # protobuf's DecodeError, UnicodeDecodeError: by implementation
        raise ModelError(f"{path}: not an ONNX model ({error}); check the path") from None
    if not texts:
        raise ModelError(f"{path}: a name is not UTF-8; {AGAIN}")
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path}: not an ONNX model (no graph or no opset); check the path")
    return proto


def _has_texts_only(message: Message) -> bool:
    """Whether every string is one: protobuf hands over as bytes what is not UTF-8."""
    for field, value in message.ListFields():
        single = isinstance(value, str | bytes | Message)
        many = cast("Sequence[object]", (value,) if single else value)
        if field.type == FieldDescriptor.TYPE_STRING:
            if not all(isinstance(text, str) for text in many):
                return False
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            if not all(_has_texts_only(inner) for inner in many if isinstance(inner, Message)):
                return False
    return True
