"""Tensors as the library of an ONNX graph takes and gives them: a head of numbers, and bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Head = npt.NDArray[np.int64]

MOST_RANK = 8  # kMaxRank of net.h

NUMBERS: dict[str, int] = {
    "f32": 1, "u8": 2, "i8": 3, "u16": 4, "i16": 5, "i32": 6, "i64": 7, "bool": 9, "f16": 10,
    "f64": 11, "u32": 12, "u64": 13, "bf16": 16, "f8e4m3": 17, "f8e4m3fnuz": 18, "f8e5m2": 19,
    "f8e5m2fnuz": 20, "u4": 21, "i4": 22, "f4e2m1": 23, "f8e8m0": 24, "u2": 25, "i2": 26,
}  # fmt: skip
"""Of each dtype, as `Type` of net.h has them, and DTYPES of ir/onnx_ops.py the other way round."""
_NAMES = {number: name for name, number in NUMBERS.items()}


def head_of(dtype: str, shape: Sequence[int]) -> Head:
    """Number of the dtype, rank, extents; the rest is zero."""
    head = empty_head()
    head[:2] = NUMBERS[dtype], len(shape)
    head[2 : 2 + len(shape)] = shape
    return head


def empty_head() -> Head:
    """One for the library to fill in."""
    return np.zeros(2 + MOST_RANK, np.int64)


def read_head(head: Head) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape that it tells."""
    return _NAMES[int(head[0])], tuple(map(int, head[2 : 2 + int(head[1])]))


def room_for(shape: Sequence[int], stored: np.dtype[Any]) -> npt.NDArray[np.uint8]:
    """Bytes for so many elements."""
    return np.empty(int(np.prod(shape, dtype=np.int64)) * stored.itemsize, np.uint8)
