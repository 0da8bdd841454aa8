"""What a reader says about one tensor, and how bytes of a mapped file become numpy arrays."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..ir.errors import ModelError
from ..ir.types import GGUF_BLOCKS, Encoding, Gguf, Plain, TensorType

Array = NDArray[Any]

NUMPY: dict[str, np.dtype[Any]] = {
    "f64": np.dtype(np.float64), "f32": np.dtype(np.float32), "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16), "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8e5m2": np.dtype(ml_dtypes.float8_e5m2), "f8e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "i64": np.dtype(np.int64), "i32": np.dtype(np.int32), "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8), "u64": np.dtype(np.uint64), "u32": np.dtype(np.uint32),
    "u16": np.dtype(np.uint16), "u8": np.dtype(np.uint8), "bool": np.dtype(np.bool_),
}  # fmt: skip
"""IR dtype name -> numpy dtype (files are little-endian, and so are the machines we run on)."""

SHOWN = 160
"""Characters of a stranger's tensor name that an error message repeats."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint. `shape` counts elements, row-major, output rows first.

    `dtype` is an IR dtype ("bf16", "f8e4m3" ...) or, for rows of GGUF blocks, their kind ("q4_1").
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def type(self) -> TensorType:
        enc: Encoding = Gguf(self.dtype) if self.dtype in GGUF_BLOCKS else Plain(self.dtype)
        return TensorType(self.shape, enc)


def fault(file: str | Path, tensor: str, what: str, do: str) -> ModelError:
    """The one form of a reader's error: `file: tensor 'name': what is wrong; what to do`."""
    name = tensor if len(tensor) <= SHOWN else tensor[:SHOWN] + "…"
    return ModelError(f"{file}: tensor {name!r}: {what}; {do}")


def map_file(path: Path) -> mmap.mmap:
    """The file mapped read-only. Raises ModelError where it is missing, empty or not a file."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); check the path") from None


def view(buffer: mmap.mmap, dtype: str, shape: tuple[int, ...], offset: int) -> Array:
    """A read-only array over the mapped file; a copy only where the file left it unaligned.

    The caller has checked that the bytes are there.
    """
    count = 1
    for extent in shape:
        count *= extent
    if count == 0:
        return np.zeros(shape, NUMPY[dtype])
    found = np.frombuffer(buffer, NUMPY[dtype], count, offset).reshape(shape)
    return found if found.flags.aligned else found.copy()
