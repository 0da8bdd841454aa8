"""ONNX operators between element types: casts, and quantisation to few bits."""

from __future__ import annotations

from .graph import Op
from .onnx_ops import dtype, is_given, numbered, onnx, shape, typed
from .opdef import OpDef
from .types import TensorType


def _cast(op: Op) -> TensorType:
    return typed(numbered(op, "to", dtype(op, 0)), shape(op, 0))


def _cast_like(op: Op) -> TensorType:
    return typed(dtype(op, 1), shape(op, 0))


def _quantize(op: Op) -> TensorType:
    otherwise = dtype(op, 2) if is_given(op, 2) else "u8"
    return typed(numbered(op, "output_dtype", otherwise), shape(op, 0))


def _dequantize(op: Op) -> TensorType:
    return typed(numbered(op, "output_dtype", dtype(op, 1)), shape(op, 0))


def _dynamic(op: Op) -> tuple[TensorType, ...]:
    return typed("u8", shape(op, 0)), typed("f32", ()), typed("u8", ())


_ROUNDING = {
    "saturate": "1: beyond the largest fp8 number comes it, not infinity or NaN",
    "round_mode": "of f8e8m0: up, down or nearest",
}
_BLOCKS = {
    "axis": "along which scales differ, where there is more than one",
    "block_size": "elements along the axis that share a scale; 0: a scale for each index",
    "output_dtype": "number of the result's dtype",
}

OPS: dict[str, OpDef] = {
    "onnx_cast": onnx(
        "Cast", "x in another dtype", 1, 1, _cast, {"to": "number of the dtype", **_ROUNDING}
    ),
    "onnx_cast_like": onnx("CastLike", "x in the dtype of another", 2, 2, _cast_like, _ROUNDING),
    "onnx_bit_cast": onnx(
        "BitCast", "the bits of x as another dtype", 1, 1, _cast, {"to": "number of the dtype"}
    ),
    "onnx_quantize_linear": onnx(
        "QuantizeLinear", "round(x / scale) + zero point, saturated", 2, 3, _quantize,
        {**_BLOCKS, "saturate": _ROUNDING["saturate"], "precision": "dtype of the division"},
    ),
    "onnx_dequantize_linear": onnx(
        "DequantizeLinear", "(x - zero point) * scale", 2, 3, _dequantize, _BLOCKS
    ),
    "onnx_dynamic_quantize_linear": onnx(
        "DynamicQuantizeLinear", "x in u8 with its scale and zero point", 1, 1, _dynamic
    ),
}  # fmt: skip
