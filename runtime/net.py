"""A loaded ONNX graph, as its user meets it: arrays in, arrays out."""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..ir.errors import ModelError, TargetError
from .artifact import Artifact, NetFacts, PortFacts
from .chat import ChatTemplate
from .devices import Device
from .model import Model
from .net_tensors import MOST_RANK, Head, empty_head, head_of, read_head, room_for
from .session import Native, Session, native_call
from .target_weights import TargetWeights
from .tokenizer import Tokenizer

Array = npt.NDArray[Any]
CPU = -1  # as the library takes the number of a device
COUNTERS = ("system_allocations", "device_allocations", "uploads", "downloads")

_NUMPY: dict[str, str] = {
    "f32": "float32", "f64": "float64", "f16": "float16", "bool": "bool", "i64": "int64",
    "i32": "int32", "i16": "int16", "i8": "int8", "u64": "uint64", "u32": "uint32",
    "u16": "uint16", "u8": "uint8",
}  # fmt: skip
_EXTENSION: dict[str, tuple[str, str]] = {
    "bf16": ("bfloat16", "uint16"), "f8e4m3": ("float8_e4m3fn", "uint8"),
    "f8e4m3fnuz": ("float8_e4m3fnuz", "uint8"), "f8e5m2": ("float8_e5m2", "uint8"),
    "f8e5m2fnuz": ("float8_e5m2fnuz", "uint8"), "f8e8m0": ("float8_e8m0fnu", "uint8"),
    "f4e2m1": ("float4_e2m1fn", "uint8"), "i4": ("int4", "int8"), "u4": ("uint4", "uint8"),
    "i2": ("int2", "int8"), "u2": ("uint2", "uint8"),
}  # fmt: skip
"""Types that numpy has not: their name in ml_dtypes, and the codes they are passed as."""
_INTEGERS = ("i4", "u4", "i2", "u2")


class Net(Model):
    """An ONNX graph. `run` is what it does; what a language model does, it refuses."""

    def __init__(
        self,
        artifact: Artifact,
        target: str,
        weights: TargetWeights,
        native: Native,
        threads: int,
        isa: str,
        device: Device | None = None,
    ) -> None:
        """Raises TargetError: an instruction set, memory or threads that are not to be had."""
        assert artifact.manifest.net is not None
        self.artifact, self.target = artifact, target
        self.graph: NetFacts = artifact.manifest.net
        self.threads, self.device = threads, device
        self._weights, self._native = weights, native
        index = CPU if device is None else device.index
        try:
            with native_call():
                self._handle: int | None = int(native["create"](index, threads, isa))
                for piece in weights.pieces:
                    native["load"](self._handle, piece)
                native["ready"](self._handle)
        except (RuntimeError, MemoryError) as error:
            raise TargetError(f"{device or 'cpu'}: {error}; run `halfbyte doctor`") from error
        self.isa = str(native["isa"](self._handle)) if device is None else target

    @property
    def session(self) -> Session:
        """Raises ModelError: a graph has no tokens."""
        raise self._no_model()

    @property
    def chat_template(self) -> ChatTemplate:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Raises ModelError: a graph has no turns."""
        raise self._no_model()

    @property
    def tokenizer(self) -> Tokenizer:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Raises ModelError: a graph has no text."""
        raise self._no_model()

    def _no_model(self) -> ModelError:
        folder, names = self.artifact.folder, [port.name for port in self.graph.inputs]
        arrays = ", ".join(f'"{name}": array' for name in names)
        files = " ".join(f"--input {name}={name}.npy" for name in names)
        return ModelError(
            f"{folder}: an ONNX graph, not a language model; call run({{{arrays}}}), or "
            f"`halfbyte run {folder} {files}`"
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, for an array of each input.

        Raises ModelError for a missing or unknown name, a dtype or shape that is not the graph's,
        and for values that an operator refuses (an index out of range). TargetError: the device
        fails.
        """
        if self._handle is None:
            raise ModelError("model: it is closed; load it again")
        self._check_names(inputs)
        passed = [_passed(port, np.asarray(inputs[port.name])) for port in self.graph.inputs]
        call, handle = self._native, self._handle
        with native_call():
            call["inputs"](handle, len(passed))
            for i, (head, data) in enumerate(passed):
                call["input"](handle, i, head, data)
            try:
                call["run"](handle)
            except RuntimeError as error:
                raise ModelError(f"{self.artifact.folder}: {error}") from error
            try:
                return {p.name: self._result(i) for i, p in enumerate(self.graph.outputs)}
            except RuntimeError as error:  # of a launch: a device tells when it is waited for
                raise TargetError(f"{self.device}: {error}; run `halfbyte doctor`") from error

    def _check_names(self, inputs: Mapping[str, Array]) -> None:
        wanted = [port.name for port in self.graph.inputs]
        if sorted(inputs) != sorted(wanted):
            raise ModelError(
                f"{self.artifact.folder}: inputs are {sorted(inputs)}, expected {sorted(wanted)}"
            )

    def _result(self, i: int) -> Array:
        head = empty_head()
        self._native["result"](self._handle, i, head)
        name, shape = read_head(head)
        stored = np.dtype(_NUMPY[name] if name in _NUMPY else _EXTENSION[name][1])
        raw = room_for(shape, stored)
        self._native["fetch"](self._handle, i, raw)
        return _named(raw.view(stored).reshape(shape), name)

    def counters(self) -> dict[str, int]:
        """So far: blocks that the system and the device were asked for, copies to and from it."""
        found = np.zeros(len(COUNTERS), np.int64)
        self._native["counters"](self._handle, found)
        return dict(zip(COUNTERS, map(int, found), strict=True))

    def close(self) -> None:
        """Frees its memory and unmaps the weights. Twice does no harm."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._native["destroy"](handle)
            self._weights.close()


def _named(codes: Array, name: str) -> Array:
    """Codes as what they mean, where ml_dtypes is there to say so."""
    if name in _NUMPY:
        return codes
    try:
        kind = getattr(importlib.import_module("ml_dtypes"), _EXTENSION[name][0])
    except (ImportError, AttributeError):
        return codes
    return codes.astype(kind) if name in _INTEGERS else codes.view(kind)


def _passed(port: PortFacts, array: Array) -> tuple[Head, Array]:
    """An input as the library takes it: type, rank and extents; bytes. Raises ModelError."""
    _check_type(port, array)
    _check_shape(port, array)
    head = head_of(port.dtype, array.shape)
    if port.dtype in _INTEGERS:
        array = array.astype(_EXTENSION[port.dtype][1])
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return head, data if data.flags.writeable else data.copy()


def _check_type(port: PortFacts, array: Array) -> None:
    wanted = (_NUMPY[port.dtype],) if port.dtype in _NUMPY else _EXTENSION[port.dtype]
    if array.dtype.name not in wanted:
        raise ModelError(
            f"input {port.name!r}: dtype {array.dtype.name}, expected {wanted[0]}; convert it"
        )


def _check_shape(port: PortFacts, array: Array) -> None:
    if array.ndim > MOST_RANK:
        raise ModelError(f"input {port.name!r}: {array.ndim} dimensions, at most {MOST_RANK}")
    if port.dims is None:
        return
    fits = len(port.dims) == array.ndim and all(
        not d.isdigit() or int(d) == n for d, n in zip(port.dims, array.shape, strict=True)
    )
    if not fits:
        raise ModelError(
            f"input {port.name!r}: shape {list(array.shape)}, expected [{', '.join(port.dims)}]"
        )
