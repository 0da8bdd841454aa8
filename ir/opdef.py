"""What an entry of the op table is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .errors import IRError
from .graph import Op
from .numerics import F64, Array
from .types import Dim, Nvfp4, Plain, TensorType

Parts = dict[str, Array]
"""A compound value in numpy, by part suffix ("" codes, "sf" block scales, "gs" globals)."""

Data = Array | Parts
"""A value in numpy: an array for a plain encoding, `Parts` for a compound one."""

ACTIVATIONS = (Plain("f32"), Plain("bf16"))

Reference = Callable[[Op, list[Data]], Data | tuple[Data, ...]]
"""Operands to result, or to a tuple of results where the op has several."""

Infer = Callable[[Op], TensorType | tuple[TensorType, ...]]


@dataclass(frozen=True, slots=True)
class OpDef:
    """One op: operand count, type rule, numpy meaning, one line of documentation.

    `inplace[i]` is the operand whose memory result i shares (a KV cache), or None.
    `onnx` is the ONNX operator that an op stands for; its meaning is the standard's, and onnx's
    reference evaluator computes it (see onnx_ops.py).
    """

    doc: str
    least: int
    most: int
    infer: Infer
    reference: Reference
    inplace: tuple[int | None, ...] = (None,)
    attrs: Mapping[str, str] = field(default_factory=dict[str, str])
    onnx: str = ""


def array(data: Data) -> Array:
    """A plain value. Raises IRError for a compound one."""
    if isinstance(data, dict):
        raise IRError(f"expected a plain array, found parts {sorted(data)}")
    return data


def parts(data: Data) -> Parts:
    """A compound value. Raises IRError for a plain one."""
    if not isinstance(data, dict):
        raise IRError(f"expected the parts of a compound value, found an array {data.shape}")
    return data


def f64(data: Data) -> F64:
    return array(data).astype(np.float64)


def plain(op: Op, i: int, dtype: str | None = None) -> TensorType:
    """Operand i, which must be plain and, if given, of `dtype`. Raises IRError."""
    type_ = op.args[i].type
    if not isinstance(type_.enc, Plain):
        raise IRError(f"{op.name}: operand {i} is {type_}, expected a plain encoding")
    if dtype is not None and type_.enc.dtype != dtype:
        raise IRError(f"{op.name}: operand {i} is {type_}, expected {dtype}")
    return type_


def activation(op: Op, i: int) -> TensorType:
    """Operand i, which must be an activation: plain f32, or bf16 on targets that keep it so."""
    type_ = plain(op, i)
    if type_.enc not in ACTIVATIONS:
        raise IRError(f"{op.name}: operand {i} is {type_}, expected f32 or bf16 activations")
    return type_


def result(op: Op, *shape: Dim) -> TensorType:
    """The type of an activation result: f32, or what the attribute `out` says (phase 32)."""
    enc = Plain(op.get("out", "f32"))
    if enc not in ACTIVATIONS:
        raise IRError(f"{op.name}: out is {enc}, expected f32 or bf16")
    return TensorType(shape, enc)


def nvfp4(op: Op, i: int) -> tuple[TensorType, Nvfp4]:
    """Operand i, which must be nvfp4. Raises IRError."""
    type_ = op.args[i].type
    if not isinstance(type_.enc, Nvfp4):
        raise IRError(f"{op.name}: operand {i} is {type_}, expected nvfp4")
    return type_, type_.enc


def expect(op: Op, what: str, found: object, wanted: object) -> None:
    """Raises IRError unless the two are equal."""
    if found != wanted:
        raise IRError(f"{op.name}: {what} is {found}, expected {wanted}")
