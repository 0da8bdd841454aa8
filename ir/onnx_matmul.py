"""ONNX operators that multiply matrices."""

from __future__ import annotations

from .graph import Op
from .onnx_ops import Shape, broadcast, dtype, onnx, shape, typed
from .opdef import OpDef
from .types import UNKNOWN, TensorType


def _product(a: Shape | None, b: Shape | None) -> Shape | None:
    """The shape of numpy.matmul, as far as it is known."""
    if not a or not b:
        return None
    batch = broadcast([a[:-2], b[:-2]])
    return None if batch is None else batch + a[-2:-1] + (b[-1:] if len(b) > 1 else ())


def _mat_mul(op: Op) -> TensorType:
    return typed(dtype(op, 0), _product(shape(op, 0), shape(op, 1)))


def _integer_product(op: Op) -> TensorType:
    return typed("i32", _product(shape(op, 0), shape(op, 1)))


def _quantized_product(op: Op) -> TensorType:
    return typed(dtype(op, 7), _product(shape(op, 0), shape(op, 3)))


def _gemm(op: Op) -> TensorType:
    a, b = shape(op, 0) or (UNKNOWN,) * 2, shape(op, 1) or (UNKNOWN,) * 2
    rows = a[-1] if op.get("transA", 0) else a[0]
    columns = b[0] if op.get("transB", 0) else b[-1]
    return typed(dtype(op, 0), (rows, columns))


def _einsum(op: Op) -> TensorType:
    """Of known rank where the equation names every axis of the result."""
    _, arrow, result = op.get("equation", "").replace(" ", "").partition("->")
    known = bool(arrow) and "." not in result
    return typed(dtype(op, 0), (UNKNOWN,) * len(result) if known else None)


def _determinant(op: Op) -> TensorType:
    found = shape(op, 0)
    return typed(dtype(op, 0), None if found is None else found[:-2])


_GEMM = {"alpha": "of the product; 1", "beta": "of C; 1", "transA": "0", "transB": "0"}

# fmt: off
OPS: dict[str, OpDef] = {
    "onnx_mat_mul": onnx("MatMul", "a b, as numpy.matmul", 2, 2, _mat_mul),
    "onnx_gemm": onnx("Gemm", "alpha a b + beta c", 2, 3, _gemm, _GEMM),
    "onnx_einsum": onnx("Einsum", "sum of products by labels", 1, 64, _einsum,
                        {"equation": "labels of operands -> of the result"}),
    "onnx_mat_mul_integer": onnx("MatMulInteger", "(a - zero) (b - zero)", 2, 4, _integer_product),
    "onnx_qlinear_mat_mul": onnx("QLinearMatMul", "quantised product of quantised matrices", 8, 8,
                                 _quantized_product),
    "onnx_det": onnx("Det", "determinants", 1, 1, _determinant),
}
# fmt: on
