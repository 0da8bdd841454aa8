"""Constants of an ONNX model: TensorProto to numpy, mapped where the bytes lie in a file.

External data is read from the model's folder only: no absolute path, no "..", no link that leads
out (but into the folder that the model itself is a link to, as caches of downloads have it). Sizes
are checked against dims before anything is read. Reference: onnx.proto, TensorProto.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from onnx import TensorProto, numpy_helper

from ..ir.errors import ModelError
from ..ir.numerics import NUMPY_DTYPES
from ..ir.onnx_ops import DTYPES
from ..ir.types import Plain, TensorType
from .tensor_info import SHOWN, Array, fault, map_file

AGAIN = "the file is damaged; export it again"
MAX_RANK = 8

ONNX_DTYPES = {ours: theirs for theirs, ours in DTYPES.items()}
"""Our dtype -> onnx.TensorProto.DataType; strings and complex numbers have none of ours."""
BITS = {"f4e2m1": 4, "i4": 4, "u4": 4, "i2": 2, "u2": 2}
"""Bits in the file of types of less than a byte, first element in the low bits."""


def dtype_name(elem_type: int) -> str:
    """ONNX's own name of an element type, for messages."""
    known = TensorProto.DataType.values()
    return TensorProto.DataType.Name(elem_type).lower() if elem_type in known else str(elem_type)


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor known at compile time. `packed`: bytes as in the file, of types under a byte;
    `flipped`: the name of the matrix that this is the transpose of, as exporters write x W^T.
    """

    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], Array]
    packed: Callable[[], Array] | None = None
    flipped: str = ""

    @property
    def type(self) -> TensorType:
        return TensorType(self.shape, Plain(self.dtype))

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array that `load` gives."""
        return self.count * NUMPY_DTYPES[self.dtype].itemsize


def constant_of(data: Array) -> Constant:
    """A constant that is there already. Raises KeyError for a dtype that the IR has not."""
    return Constant(DTYPE_OF_NUMPY[data.dtype], data.shape, lambda: data)


def transpose_of(matrix: Constant) -> Callable[[], Array]:
    """Loads the transpose, dense."""
    return lambda: np.ascontiguousarray(matrix.load().T)


DTYPE_OF_NUMPY = {numpy: ours for ours, numpy in NUMPY_DTYPES.items()}


class TensorReader:
    """Makes constants of TensorProtos. Files are mapped once and stay mapped."""

    def __init__(self, model: Path, mapped: mmap.mmap) -> None:
        self._model, self._folder = model, model.parent.resolve()
        self._allowed = (self._folder, model.resolve().parent)
        self._mapped: dict[Path, mmap.mmap] = {model.resolve(): mapped}

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds data of a constant, the model first."""
        return tuple(self._mapped)

    def constant(self, tensor: TensorProto, name: str) -> Constant:
        """The constant. Raises ModelError naming file and tensor; data is read when asked for."""
        dtype = DTYPES.get(tensor.data_type)
        if dtype is None:
            raise self._fault(
                name,
                f"type {dtype_name(tensor.data_type)}, expected one of {', '.join(ONNX_DTYPES)}",
                "tensors of strings or complex numbers cannot be compiled",
            )
        shape = tuple(tensor.dims)
        if len(shape) > MAX_RANK or any(d < 0 for d in shape):
            what = f"dims {list(shape)[:12]}, expected at most {MAX_RANK} extents from 0 up"
            raise self._fault(name, what, AGAIN)
        if tensor.HasField("segment"):
            raise self._fault(name, "is stored in segments", "export it in one piece")
        if tensor.data_location == TensorProto.EXTERNAL:
            return self._raw(name, dtype, shape, self._external(tensor, name))
        if tensor.HasField("raw_data"):
            return self._raw(name, dtype, shape, memoryview(tensor.raw_data))
        return constant_of(self._typed(tensor, name, dtype, shape))

    def _typed(self, tensor: TensorProto, name: str, dtype: str, shape: tuple[int, ...]) -> Array:
        """Data in one of the typed fields, which are never large (onnx_wire.py)."""
        try:
            data = numpy_helper.to_array(tensor)
        except Exception as error:  # onnx raises what numpy raises: ValueError, TypeError ...
            raise self._fault(name, f"data do not fit dims {list(shape)}: {error}", AGAIN) from None
        if data.shape != shape or data.dtype != NUMPY_DTYPES[dtype]:
            raise self._fault(name, f"data do not fit {dtype} {list(shape)}", AGAIN)
        return data

    def _raw(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> Constant:
        count = math.prod(shape)
        bits = BITS.get(dtype, 8 * NUMPY_DTYPES[dtype].itemsize)
        nbytes = -(-count * bits // 8)
        if len(data) != nbytes:
            what = f"{dtype} {list(shape)} takes {nbytes} bytes, found {len(data)}"
            raise self._fault(name, what, AGAIN)
        if dtype not in BITS:
            return Constant(dtype, shape, lambda: _view(data, dtype, shape))
        packed = np.frombuffer(data, np.uint8)
        return Constant(dtype, shape, lambda: _unpacked(packed, dtype, shape), lambda: packed)

    def _external(self, tensor: TensorProto, name: str) -> memoryview:
        facts = {e.key: e.value for e in tensor.external_data}
        path = self._inside(name, facts.get("location", ""))
        if path not in self._mapped:
            self._mapped[path] = map_file(path)
        data = memoryview(self._mapped[path])
        offset = self._natural(name, "offset", facts.get("offset", "0"))
        length = self._natural(name, "length", facts.get("length") or str(len(data) - offset))
        if offset + length > len(data):
            what = f"bytes {offset} to {offset + length} of {path.name}, which has {len(data)}"
            raise self._fault(name, what, "download or export the data file again")
        return data[offset : offset + length]

    def _inside(self, name: str, location: str) -> Path:
        pure = PurePosixPath(location)
        bad = not location or "\0" in location or "\\" in location or pure.is_absolute()
        path = (self._folder / pure) if not bad else self._folder
        try:
            real = path.resolve()
            outside = bad or ".." in pure.parts or not any(map(real.is_relative_to, self._allowed))
            found = not outside and real.is_file()
        except (OSError, RuntimeError, ValueError):
            outside, found = True, False
        if outside:
            what = f"external data {location[:SHOWN]!r} lies outside {self._folder}"
            raise self._fault(name, what, "external data must lie in the model's folder; move it")
        if not found:
            what = f"external data {location[:SHOWN]!r} is missing in {self._folder}"
            raise self._fault(name, what, "put the data file beside the model")
        return path.resolve()

    def _natural(self, name: str, what: str, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= 19):
            found = f"{what} of its external data is {text[:40]!r}, expected a number"
            raise self._fault(name, found, AGAIN)
        return int(text)

    def _fault(self, name: str, what: str, do: str) -> ModelError:
        return fault(self._model, name, what, do)


def _view(data: memoryview, dtype: str, shape: tuple[int, ...]) -> Array:
    """A read-only array over the bytes; a copy only where they are not aligned."""
    if dtype == "bool":  # a byte of 2 is true, and no kernel may see it
        return (np.frombuffer(data, np.uint8) != 0).reshape(shape)
    found = np.frombuffer(data, NUMPY_DTYPES[dtype]).reshape(shape)
    return found if found.flags.aligned else found.copy()


def _unpacked(packed: Array, dtype: str, shape: tuple[int, ...]) -> Array:
    bits = BITS[dtype]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = ((packed[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[: math.prod(shape)]
    if dtype.startswith("i"):
        signed = (codes << (8 - bits)).view(np.int8) >> (8 - bits)
        return signed.astype(NUMPY_DTYPES[dtype]).reshape(shape)
    if dtype.startswith("u"):
        return codes.astype(NUMPY_DTYPES[dtype]).reshape(shape)
    return codes.view(NUMPY_DTYPES[dtype]).reshape(shape)
