"""ONNX operators that compute each element by itself: arithmetic, comparison, activation, cast."""

from __future__ import annotations

from .onnx_ops import elementwise, like, onnx
from .opdef import OpDef

OPS: dict[str, OpDef] = {
    "onnx_add": onnx("Add", "a + b", 2, 2, elementwise()),
    "onnx_relu": onnx("Relu", "max(x, 0)", 1, 1, like()),
}
