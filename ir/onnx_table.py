"""The ONNX operators of the op table, by family."""

from __future__ import annotations

from . import (
    onnx_attention,
    onnx_cast,
    onnx_control,
    onnx_conv,
    onnx_elementwise,
    onnx_features,
    onnx_matmul,
    onnx_movement,
    onnx_normalize,
    onnx_recurrent,
    onnx_reduce,
    onnx_resample,
    onnx_signal,
    onnx_training,
)
from .opdef import OpDef

OPS: dict[str, OpDef] = {
    **onnx_attention.OPS,
    **onnx_cast.OPS,
    **onnx_control.OPS,
    **onnx_conv.OPS,
    **onnx_elementwise.OPS,
    **onnx_features.OPS,
    **onnx_matmul.OPS,
    **onnx_movement.OPS,
    **onnx_normalize.OPS,
    **onnx_recurrent.OPS,
    **onnx_reduce.OPS,
    **onnx_resample.OPS,
    **onnx_signal.OPS,
    **onnx_training.OPS,
}
