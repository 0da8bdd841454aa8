"""What a reader says about one tensor, and how bytes of a mapped file become numpy arrays."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import ModelError
from ..ir.numerics import NUMPY_DTYPES
from ..ir.types import GGUF_BLOCKS, Encoding, Gguf, Plain, TensorType

Array = NDArray[Any]

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
        return np.zeros(shape, NUMPY_DTYPES[dtype])
    found = np.frombuffer(buffer, NUMPY_DTYPES[dtype], count, offset).reshape(shape)
    return found if found.flags.aligned else found.copy()
