"""A library of an ONNX graph, driven node by node: what the self-test needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import tvm_ffi

from ..ir.errors import TargetError
from ..ir.numerics import NUMPY_DTYPES, Array
from ..runtime.net_tensors import Head, empty_head, head_of, read_head, room_for

CPU = -1  # no CUDA device
Bytes = npt.NDArray[np.uint8]

_CODES = {"i4": np.int8, "i2": np.int8, "u4": np.uint8, "u2": np.uint8}


class NetSession:
    """A library with its weights. Close it to free its memory."""

    def __init__(self, library: Path, image: Bytes | None, threads: int, device: int = CPU) -> None:
        try:
            self._module = cast(Any, tvm_ffi).load_module(str(library))
        except (OSError, RuntimeError) as error:
            raise TargetError(f"{library}: this system cannot load it: {error}") from error
        self._image = _aligned(0) if image is None else image
        self._handle = cast(int, self._module["create"](device, threads, "auto"))
        self._module["load"](self._handle, self._image)
        self._module["ready"](self._handle)
        self.isa = str(self._module["isa"](self._handle))

    def __enter__(self) -> NetSession:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._module["destroy"](self._handle)

    def launch(
        self, program: int, node: int, operands: Sequence[Array | None], results: int
    ) -> list[Array]:
        """One node on these operands, None where one is absent or a constant of the library.

        Raises RuntimeError with the kernel's words where it refuses them.
        """
        module, handle = self._module, self._handle
        module["inputs"](handle, len(operands))
        kept = [None if t is None else _native(t) for t in operands]
        for i, pair in enumerate(kept):
            if pair is not None:
                module["input"](handle, i, *pair)
        module["launch"](handle, program, node)
        return [self._result(i) for i in range(results)]

    def _result(self, i: int) -> Array:
        head = empty_head()
        self._module["result"](self._handle, i, head)
        name, shape = read_head(head)
        dtype = NUMPY_DTYPES[name]
        raw = room_for(shape, dtype)
        self._module["fetch"](self._handle, i, raw)
        stored = _CODES.get(name)
        flat = raw.view(stored).astype(dtype) if stored else raw.view(dtype)
        return flat.reshape(shape)


def _aligned(size: int) -> Bytes:
    """Bytes that begin at a multiple of 64."""
    whole = np.zeros(size + 64, np.uint8)
    begin = -whole.ctypes.data % 64
    return whole[begin : begin + size]


def _native(tensor: Array) -> tuple[Head, Bytes]:
    """A tensor as the library takes it: type, rank and extents; bytes."""
    name = next(d for d, dtype in NUMPY_DTYPES.items() if dtype == tensor.dtype)
    stored = _CODES.get(name)
    coded = tensor.astype(stored) if stored else tensor
    return head_of(name, tensor.shape), np.ascontiguousarray(coded).reshape(-1).view(np.uint8)
