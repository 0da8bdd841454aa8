"""weights.safetensors: written as a stream, read as one mapped image.

The image is the data section of the file. Every tensor in it starts at a multiple of 64 bytes, gaps
are `__pad.N` tensors (safetensors allows no holes), and the header is padded with spaces so that
the image itself is 64-byte aligned in the file: a mapped page address plus an offset is aligned.
Offsets, here and in the manifest and in the library's plan, count from the start of the image.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ..ir.errors import IRError, ModelError
from .disk import writing
from .manifest import ALIGN, Part
from .strict import decode, parse_json, refuse

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E5M2": 1,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8,
    "F64": 8,
}  # fmt: skip
_HUGE_PAGE = 2 << 20
_LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written. `dtype` is safetensors' word ("U8", "F32", ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class WeightImage:
    """Where each tensor lies: `offsets` of `specs`, and the size of the whole, a multiple of 64."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    nbytes: int


def place(specs: Iterable[TensorSpec]) -> WeightImage:
    """Offsets of tensors in file order, each aligned to 64 bytes."""
    specs, offsets, end = tuple(specs), list[int](), 0
    for spec in specs:
        offsets.append(end)
        end += -(-spec.nbytes // ALIGN) * ALIGN
    if len({spec.name for spec in specs}) != len(specs):
        raise IRError(f"weights: duplicate tensor names among {len(specs)}")
    return WeightImage(specs, tuple(offsets), end)


def header_of(image: WeightImage) -> bytes:
    """The file up to the image: length, JSON, spaces."""
    entries: dict[str, object] = {"__metadata__": {"producer": "halfbyte"}}
    ends = (*image.offsets[1:], image.nbytes)
    for i, (spec, begin, limit) in enumerate(zip(image.specs, image.offsets, ends, strict=True)):
        end = begin + spec.nbytes
        entries[spec.name] = _entry(spec.dtype, spec.shape, begin, end)
        if end < limit:
            entries[f"__pad.{i}"] = _entry("U8", (limit - end,), end, limit)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return struct.pack("<Q", len(text)) + text


def _entry(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class WeightsWriter:
    """Writes the tensors of an image in order, in pieces of any size; hashes as it goes.

    The file grows by whole huge pages: the page cache then keeps each in one (ext4 from Linux 6.16
    on, xfs), a mapping of the file has few entries, and reading W fast does not end at the TLB.
    """

    def __init__(self, path: Path, image: WeightImage) -> None:
        self._path, self._image = path, image
        self._hash = hashlib.sha256()
        self._next = 0  # index of the tensor to come
        self._pending = 0  # bytes missing of the tensor before it
        self._size = 0
        self._pad = 0
        self._stage, self._staged = memoryview(bytearray(_HUGE_PAGE)), 0
        with writing(path):
            self._file = path.open("xb", buffering=0)
            self._put(header_of(image))

    def begin(self, name: str) -> None:
        """Announces the next tensor. Raises IRError out of order or when the last one is short."""
        self._finish_tensor()
        specs = self._image.specs
        expected = specs[self._next].name if self._next < len(specs) else "nothing more"
        if name != expected:
            raise IRError(f"{self._path}: tensor out of order, expected {expected}, found {name}")
        self._pending = specs[self._next].nbytes
        self._pad = -self._pending % ALIGN
        self._next += 1

    def write(self, piece: bytes | bytearray | memoryview) -> None:
        """Appends bytes of the tensor begun. C-contiguous; raises IRError for too many."""
        data = memoryview(piece).cast("B")
        if len(data) > self._pending:
            name = self._image.specs[self._next - 1].name if self._next else "(none begun)"
            raise IRError(f"{self._path}: {name}: {len(data) - self._pending} bytes too many")
        with writing(self._path):
            self._put(data)
        self._pending -= len(data)

    def add(self, name: str, array: npt.NDArray[np.generic]) -> None:
        """Writes a whole tensor at once (any numpy or ml_dtypes element type)."""
        self.begin(name)
        if array.size:
            self.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> Part:
        """Ends the file and makes it durable; returns its size and digest."""
        self._finish_tensor()
        if self._next != len(self._image.specs):
            missing = self._image.specs[self._next].name
            raise IRError(f"{self._path}: tensors missing from {missing} on")
        with writing(self._path):
            self._flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return Part(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Closes the file without finishing it."""
        self._file.close()

    def _finish_tensor(self) -> None:
        if self._pending:
            name = self._image.specs[self._next - 1].name
            raise IRError(f"{self._path}: {name}: {self._pending} bytes were never written")
        if self._pad:
            with writing(self._path):
                self._put(bytes(self._pad))
            self._pad = 0

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._size += len(data)
        rest = memoryview(data)
        while len(rest):
            piece = rest[: _HUGE_PAGE - self._staged]
            self._stage[self._staged : self._staged + len(piece)] = piece
            self._staged += len(piece)
            rest = rest[len(piece) :]
            if self._staged == _HUGE_PAGE:
                self._flush()

    def _flush(self) -> None:
        rest = self._stage[: self._staged]
        while len(rest):  # an unbuffered write may be short (signals, a disk that fills up)
            rest = rest[self._file.write(rest) :]
        self._staged = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _HeaderEntry:
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]


class WeightsFile:
    """A weights file mapped read-only: its pages are shared by every process that maps it.

    `image` and the arrays of `tensor` look writable to numpy, because the exchange of tensors with
    native code refuses read-only arrays; a write to them would be a fault. They are valid until
    `close`.
    """

    def __init__(self, path: Path) -> None:
        """Maps the file and reads its header. Raises ModelError for anything but a sound one."""
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                begin, header = _read_header(file.read(8), file, size, str(path))
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            _advise_huge_pages(self._map)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot map: {error}; compile the model again") from error
        self._entries = header
        address = np.frombuffer(self._map, np.uint8).ctypes.data + begin
        self.image = _bytes_at(address, size - begin)

    def names(self) -> list[str]:
        """Tensor names in file order, without padding."""
        return [name for name in self._entries if not name.startswith("__pad.")]

    def tensor(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of one tensor, no copy. Raises ModelError for an unknown name."""
        if name not in self._entries:
            raise ModelError(f"weights: no tensor {name}; expected one of {self.names()[:8]}...")
        begin, end = self._entries[name].data_offsets
        return self.image[begin:end]

    def close(self) -> None:
        """Unmaps; every array handed out dies with it."""
        self.image = np.empty(0, np.uint8)
        self._map.close()


def _advise_huge_pages(mapped: mmap.mmap) -> None:
    """Asks that what is not in the page cache yet be read into huge pages.

    Advice only: a kernel or file system without huge pages for files is slower, not wrong.
    """
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)


def _bytes_at(address: int, size: int) -> npt.NDArray[np.uint8]:
    if size == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(address)), np.uint8)


def _read_header(
    prefix: bytes, file: BinaryIO, size: int, where: str
) -> tuple[int, dict[str, _HeaderEntry]]:
    """Offset of the image and the checked entries: in order, without holes, of the right size."""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, _LARGEST_HEADER):
        raise refuse(where, "header beyond the file", f"at most {size - 8} bytes", length)
    value = parse_json(file.read(length), where)
    if not isinstance(value, dict):
        raise refuse(where, "header is no object", "an object", value)
    entries = {
        name: decode(_HeaderEntry, entry, f"{where}: {name}")
        for name, entry in value.items()
        if name != "__metadata__"
    }
    end = 0
    for name, entry in entries.items():
        end = _check_entry(entry, end, f"{where}: {name}")
    if end != size - 8 - length or (8 + length) % ALIGN:
        raise refuse(where, "wrong size of data", f"{end} bytes", size - 8 - length)
    return 8 + length, entries


def _check_entry(entry: _HeaderEntry, begin: int, where: str) -> int:
    if entry.dtype not in ITEM_BYTES:
        raise refuse(where, "unknown dtype", f"one of {sorted(ITEM_BYTES)}", entry.dtype)
    end = begin + math.prod(entry.shape) * ITEM_BYTES[entry.dtype]
    if entry.data_offsets != (begin, end):
        raise refuse(where, "wrong data_offsets", str((begin, end)), entry.data_offsets)
    return end
