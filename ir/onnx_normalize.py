"""ONNX operators that normalise: softmax, and by mean and variance of axes, channels or groups."""

from __future__ import annotations

from .graph import Op
from .onnx_ops import dtype, like, onnx, shape, typed
from .onnx_reduce import axis_of
from .opdef import OpDef
from .types import TensorType

_STASH = {1: "f32", 16: "bf16"}
"""By onnx.TensorProto.DataType: what mean and deviation of a layer normalisation are kept in."""


def _layer(op: Op) -> tuple[TensorType, TensorType, TensorType]:
    found = shape(op, 0)
    stash = _STASH.get(op.get("stash_type", 1), "f32")
    rest = found
    if found is not None:
        axis = axis_of(op, -1, len(found))
        rest = found[:axis] + (1,) * (len(found) - axis)
    return typed(dtype(op, 0), found), typed(stash, rest), typed(stash, rest)


def _batch(op: Op) -> tuple[TensorType, TensorType, TensorType]:
    return like()(op), like(3)(op), like(4)(op)


_LINE = {"axis": "-1"}
_EPSILON = {"epsilon": "added to the variance; 1e-5"}
_FROM_AXIS = {"axis": "the first of those normalised over; -1", **_EPSILON, "stash_type": "1"}

# fmt: off
OPS: dict[str, OpDef] = {
    "onnx_softmax": onnx("Softmax", "e^x / sum(e^x)", 1, 1, like(), _LINE),
    "onnx_log_softmax": onnx("LogSoftmax", "log(softmax(x))", 1, 1, like(), _LINE),
    "onnx_hardmax": onnx("Hardmax", "1 at the first of the largest, else 0", 1, 1, like(), _LINE),
    "onnx_layer_normalization": onnx("LayerNormalization", "(x - mean) / deviation * scale + bias;"
                                     " mean; 1 / deviation", 2, 3, _layer, _FROM_AXIS),
    "onnx_rms_normalization": onnx("RMSNormalization", "x / rms(x) * scale", 2, 2, like(),
                                   _FROM_AXIS),
    "onnx_group_normalization": onnx("GroupNormalization", "by groups of channels", 3, 3, like(),
                                     {**_EPSILON, "num_groups": "a divisor of the channels",
                                      "stash_type": "1"}),
    "onnx_instance_normalization": onnx("InstanceNormalization", "by channels of each example", 3,
                                        3, like(), _EPSILON),
    "onnx_batch_normalization": onnx("BatchNormalization", "by channels, with given statistics or"
                                     " (training) the batch's; running mean; running variance",
                                     5, 5, _batch,
                                     {**_EPSILON, "momentum": "of the running statistics; 0.9",
                                      "training_mode": "0"}),
    "onnx_lp_normalization": onnx("LpNormalization", "x / norm(x) along an axis", 1, 1, like(),
                                  {**_LINE, "p": "of the norm: 1, 2; 2"}),
    "onnx_lrn": onnx("LRN", "x / (bias + alpha / size * sum of neighbours' squares)^beta", 1, 1,
                     like(), {"alpha": "1e-4", "beta": "0.75", "bias": "1", "size": "channels"}),
}
# fmt: on
