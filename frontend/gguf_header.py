"""The header of a GGUF file, walked by us: every count and length is checked against the file
before anything is allocated for it (the `gguf` package trusts them). Metadata waits to be asked.

Format: magic, version, tensor count, key/value count; the key/values; the tensor table; padding to
`general.alignment`; the tensors.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..ir.errors import ModelError
from ..ir.types import DTYPE_BYTES, GGUF_BLOCKS
from .bounded_json import SLACK
from .tensor_info import SHOWN, Array, fault, map_file, view

AGAIN = "download the file again"
STRING, ARRAY = 8, 9
SCALARS: dict[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
TENSOR_TYPES: dict[int, str] = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 8: "q8_0", 12: "q4_k", 13: "q5_k", 14: "q6_k",
    24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 30: "bf16", 40: "nvfp4",
}  # fmt: skip
OTHER_TYPES: dict[int, str] = {
    6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
MAX_RANK = 4
MAX_KEY = 65535
MAX_STRINGS = 1 << 22
"""Strings of all metadata together (walked in about a second each million); real files have 1 M."""
Scalar = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Field:
    """Where a metadata value lies: `count` items of `type` at `offset`, ending before `end`."""

    type: int
    is_array: bool
    count: int
    offset: int
    end: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table; `shape` row-major (GGUF reverses it), `offset` in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Cursor:
    """Reads forward through the mapped header; every step is checked against the file's end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path, self.buffer, self.at = path, buffer, 0
        self.size, self.strings = len(buffer), 0

    def take(self, nbytes: int, what: str) -> int:
        """Step over `nbytes`, return where they begin."""
        if nbytes > self.size - self.at:
            raise ModelError(
                f"{self.path}: {what} needs {nbytes} bytes at offset {self.at}, found "
                f"{self.size - self.at}; the file is cut short, {AGAIN}"
            )
        self.at += nbytes
        return self.at - nbytes

    def number(self, fmt: str, what: str) -> int:
        return struct.unpack_from(fmt, self.buffer, self.take(struct.calcsize(fmt), what))[0]

    def text(self, what: str, limit: int) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise ModelError(
                f"{self.path}: {what} has {length} bytes, expected <= {limit}; {AGAIN}"
            )
        begin = self.take(length, what)
        return self.buffer[begin : begin + length].decode("utf-8", "replace")

    def skip_strings(self, count: int, what: str) -> None:
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise ModelError(
                f"{self.path}: {what} brings the strings of the header to {self.strings}, expected "
                f"at most {MAX_STRINGS}; {AGAIN}"
            )
        unpack, buffer, size, at = struct.Struct("<Q").unpack_from, self.buffer, self.size, self.at
        for _ in range(count):
            if at + 8 > size:
                break
            at += 8 + unpack(buffer, at)[0]
        else:
            if at <= size:
                self.at = at
                return
        raise ModelError(f"{self.path}: {what} runs past the end of the file; {AGAIN}")


class GgufFile:
    """A mapped GGUF file: `fields` (metadata, decoded on demand) and `tensors`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.buffer = map_file(path)
        cursor = _Cursor(path, self.buffer)
        tensor_count, field_count = self._counts(cursor)
        self.fields: dict[str, Field] = {}
        for _ in range(field_count):
            self._read_field(cursor)
        rows = [self._read_tensor(cursor) for _ in range(tensor_count)]
        self.tensors = self._place(rows, cursor.at)

    def _counts(self, cursor: _Cursor) -> tuple[int, int]:
        size = len(self.buffer)
        begin = cursor.take(4, "the magic")
        if self.buffer[begin : begin + 4] != b"GGUF":
            raise ModelError(f"{self.path}: not a GGUF file, expected it to begin with 'GGUF'")
        version = cursor.number("<I", "the version")
        if version not in (2, 3):
            raise ModelError(
                f"{self.path}: GGUF version {version}, expected 2 or 3, little-endian; "
                "convert the model again"
            )
        tensors = cursor.number("<Q", "the tensor count")
        fields = cursor.number("<Q", "the metadata count")
        if 600 * tensors + 500 * fields > size + SLACK or 24 * tensors + 13 * fields > size:
            raise ModelError(
                f"{self.path}: {tensors} tensors and {fields} metadata entries do not fit into "
                f"{size} bytes; {AGAIN}"
            )
        return tensors, fields

    def _read_field(self, cursor: _Cursor) -> None:
        key = cursor.text("a metadata key", MAX_KEY)
        what = f"metadata {key[:SHOWN]!r}"
        if key in self.fields:
            raise ModelError(f"{self.path}: {what} stands twice; {AGAIN}")
        kind, count, is_array = cursor.number("<I", what), 1, False
        if kind == ARRAY:
            kind, count, is_array = cursor.number("<I", what), cursor.number("<Q", what), True
        begin = cursor.at
        if kind == STRING:
            cursor.skip_strings(count, what)
        elif kind in SCALARS:
            cursor.take(count * struct.calcsize(SCALARS[kind]), what)
        else:
            raise ModelError(f"{self.path}: {what} has unknown value type {kind}; {AGAIN}")
        self.fields[key] = Field(kind, is_array, count, begin, cursor.at)

    def _read_tensor(self, cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
        name = cursor.text("a tensor name", MAX_KEY)
        rank = cursor.number("<I", f"tensor {name[:SHOWN]!r}")
        if rank > MAX_RANK:
            raise fault(self.path, name, f"{rank} dimensions, expected at most {MAX_RANK}", AGAIN)
        shape = tuple(cursor.number("<Q", f"tensor {name[:SHOWN]!r}") for _ in range(rank))
        kind = cursor.number("<I", f"tensor {name[:SHOWN]!r}")
        return name, kind, shape[::-1], cursor.number("<Q", f"tensor {name[:SHOWN]!r}")

    def _place(
        self, rows: list[tuple[str, int, tuple[int, ...], int]], header_end: int
    ) -> dict[str, Tensor]:
        alignment = self.number("general.alignment", 32)
        if not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ModelError(f"{self.path}: general.alignment {alignment} is not a power of two")
        start = -(-header_end // alignment) * alignment
        placed: dict[str, Tensor] = {}
        for name, kind, shape, offset in rows:
            if name in placed:
                raise fault(self.path, name, "stands twice in the tensor table", AGAIN)
            dtype, nbytes = self._sized(name, kind, shape)
            if offset % alignment or start + offset + nbytes > len(self.buffer):
                raise fault(
                    self.path,
                    name,
                    f"offset {offset} and {nbytes} bytes: expected a multiple of "
                    f"{alignment} and an end within {len(self.buffer) - start}",
                    AGAIN,
                )
            placed[name] = Tensor(name, dtype, shape, start + offset, nbytes)
        self._check_overlap(placed)
        return placed

    def _sized(self, name: str, kind: int, shape: tuple[int, ...]) -> tuple[str, int]:
        dtype = TENSOR_TYPES.get(kind)
        if dtype is None:
            raise fault(
                self.path,
                name,
                f"unsupported type {OTHER_TYPES.get(kind, kind)}, expected one of "
                f"{', '.join(t.upper() for t in TENSOR_TYPES.values())}",
                "take another quantisation of this model",
            )
        if dtype not in GGUF_BLOCKS:
            return dtype, math.prod(shape) * DTYPE_BYTES[dtype]
        elements, nbytes = GGUF_BLOCKS[dtype]
        if not shape or shape[-1] % elements:
            raise fault(
                self.path,
                name,
                f"{dtype} needs rows of a multiple of {elements}, found shape {list(shape)}",
                AGAIN,
            )
        return dtype, math.prod(shape) // elements * nbytes

    def _check_overlap(self, placed: dict[str, Tensor]) -> None:
        at, before = 0, ""
        for tensor in sorted(placed.values(), key=lambda t: (t.offset, t.nbytes)):
            if tensor.offset < at:
                raise fault(self.path, tensor.name, f"overlaps {before[:SHOWN]!r}", AGAIN)
            at, before = tensor.offset + tensor.nbytes, tensor.name

    def bytes_of(self, tensor: Tensor) -> Array:
        """The tensor: plain dtypes as they are, blocks as u8 [..., bytes of a row]."""
        if tensor.dtype not in GGUF_BLOCKS:
            return view(self.buffer, tensor.dtype, tensor.shape, tensor.offset)
        elements, nbytes = GGUF_BLOCKS[tensor.dtype]
        shape = (*tensor.shape[:-1], tensor.shape[-1] // elements * nbytes)
        return view(self.buffer, "u8", shape, tensor.offset)

    # ---- metadata ------------------------------------------------------------------------------

    def items(self, key: str) -> list[Scalar]:
        """The values of an array (or of one scalar) as a list; [] where the key is absent."""
        field = self.fields.get(key)
        if field is None:
            return []
        if 80 * field.count + 4 * (field.end - field.offset) > len(self.buffer) + SLACK:
            raise ModelError(f"{self.path}: metadata {key!r} is too large for the file; {AGAIN}")
        if field.type == STRING:
            return list(self._strings(field))
        fmt = SCALARS[field.type]
        return list(struct.unpack_from(f"<{field.count}{fmt[1]}", self.buffer, field.offset))

    def _strings(self, field: Field) -> Iterator[str]:
        at = field.offset
        for _ in range(field.count):
            length = int.from_bytes(self.buffer[at : at + 8], "little")
            yield self.buffer[at + 8 : at + 8 + length].decode("utf-8", "replace")
            at += 8 + length

    def scalar(self, key: str) -> Scalar | None:
        """The value of a scalar entry; None where absent. Raises ModelError for an array."""
        field = self.fields.get(key)
        if field is None:
            return None
        if field.is_array:
            raise ModelError(f"{self.path}: metadata {key!r} is an array, expected one value")
        return self.items(key)[0]

    def number(self, key: str, default: int) -> int:
        value = self.scalar(key)
        if value is None:
            return default
        if not isinstance(value, int):
            raise ModelError(
                f"{self.path}: metadata {key!r} is {str(value)[:80]!r}, expected a "
                "whole number; convert the file again"
            )
        return int(value)

    def text(self, key: str, default: str = "") -> str:
        value = self.scalar(key)
        return default if value is None else str(value)

    def strings(self, key: str) -> list[str]:
        """An array of strings; [] where absent."""
        return [str(item) for item in self.items(key)]
