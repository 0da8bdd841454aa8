"""ONNX operators over windows of images: convolutions and pools.

Rules say batch and channels; how many windows there are, onnx's shape inference knows.
"""

from __future__ import annotations

from collections.abc import Callable

from .graph import Op
from .onnx_ops import dtype, like, of_rank, onnx, shape, typed, unranked
from .opdef import OpDef
from .types import UNKNOWN, Dim, TensorType

_WINDOWS = {
    "auto_pad": "NOTSET, SAME_UPPER, SAME_LOWER or VALID",
    "dilations": "steps between taps, per axis",
    "kernel_shape": "taps, per axis",
    "pads": "begins, then ends, per axis",
    "strides": "steps between windows, per axis",
}
_CONV = {**_WINDOWS, "group": "groups of channels"}
_POOL = {**_WINDOWS, "ceil_mode": "a last window that only begins inside counts"}


def _windows(op: Op, channels: Dim | None, result: str | None = None) -> TensorType:
    """[batch of operand 0, `channels` or its own, ?...]."""
    x = shape(op, 0)
    if x is None or len(x) < 2:
        return typed(result or dtype(op, 0), None)
    own = x[1] if channels is None else channels
    return typed(result or dtype(op, 0), (x[0], own, *(UNKNOWN for _ in x[2:])))


def _conv(weight: int = 1, result: str | None = None) -> Callable[[Op], TensorType]:
    """As many channels as operand `weight` has rows."""

    def infer(op: Op) -> TensorType:
        w = shape(op, weight)
        return _windows(op, w[0] if w else UNKNOWN, result)

    return infer


def _conv_transpose(op: Op) -> TensorType:
    w, group = shape(op, 1), op.get("group", 1)
    rows = w[1] if w is not None and len(w) > 1 else UNKNOWN
    return _windows(op, rows * group if isinstance(rows, int) else UNKNOWN)


def _qlinear_conv(op: Op) -> TensorType:
    return _conv(3, dtype(op, 7))(op)


def _pool(op: Op) -> TensorType:
    return _windows(op, None)


def _max_pool(op: Op) -> tuple[TensorType, TensorType]:
    pooled = _windows(op, None)
    return pooled, TensorType(pooled.shape, typed("i64", ()).enc)


def _whole(op: Op) -> TensorType:
    x = shape(op, 0)
    if x is None or len(x) < 2:
        return typed(dtype(op, 0), None)
    return typed(dtype(op, 0), (x[0], x[1], *(1 for _ in x[2:])))


def _causal_conv(op: Op) -> tuple[TensorType, TensorType]:
    return like()(op), of_rank()(op)


def _regions(op: Op) -> TensorType:
    """[regions of operand 1, channels of operand 0, ?, ?]."""
    x, rois = shape(op, 0), shape(op, 1)
    channels = x[1] if x is not None and len(x) > 1 else UNKNOWN
    return typed(dtype(op, 0), (rois[0] if rois else UNKNOWN, channels, UNKNOWN, UNKNOWN))


OPS: dict[str, OpDef] = {
    "onnx_conv": onnx("Conv", "convolution [N, C, ...] by [M, C/group, ...]", 2, 3, _conv(), _CONV),
    "onnx_conv_transpose": onnx(
        "ConvTranspose", "the gradient of Conv", 2, 3, _conv_transpose,
        _CONV | {"output_padding": "more outputs at ends", "output_shape": "decides the pads"},
    ),
    "onnx_conv_integer": onnx(
        "ConvInteger", "Conv of 8-bit integers into i32", 2, 4, _conv(result="i32"), _CONV
    ),
    "onnx_qlinear_conv": onnx("QLinearConv", "quantised Conv", 8, 9, _qlinear_conv, _CONV),
    "onnx_deform_conv": onnx(
        "DeformConv", "Conv whose taps are moved by offsets", 3, 5, _conv(),
        {key: _CONV[key] for key in _CONV if key != "auto_pad"}
        | {"offset_group": "groups of channels that share offsets"},
    ),
    "onnx_col2im": onnx(
        "Col2Im", "the sum of overlapping blocks [N, C * block, L]", 3, 3, unranked(),
        {key: _WINDOWS[key] for key in ("dilations", "pads", "strides")},
    ),
    "onnx_causal_conv_with_state": onnx(
        "CausalConvWithState", "depthwise Conv of the past; also the last inputs", 2, 4,
        _causal_conv, {"activation": "none, silu or swish"},
    ),
    "onnx_max_pool": onnx(
        "MaxPool", "maxima of windows; also where they lie", 1, 1, _max_pool,
        _POOL | {"storage_order": "of the indices; 1: column-major"},
    ),
    "onnx_average_pool": onnx(
        "AveragePool", "means of windows", 1, 1, _pool, _POOL | {"count_include_pad": "0 or 1"}
    ),
    "onnx_lp_pool": onnx("LpPool", "norms of windows", 1, 1, _pool, _POOL | {"p": "of the norm"}),
    "onnx_global_average_pool": onnx("GlobalAveragePool", "means of planes", 1, 1, _whole),
    "onnx_global_max_pool": onnx("GlobalMaxPool", "maxima of planes", 1, 1, _whole),
    "onnx_global_lp_pool": onnx(
        "GlobalLpPool", "norms of planes", 1, 1, _whole, {"p": "of the norm"}
    ),
    "onnx_max_unpool": onnx(
        "MaxUnpool", "maxima back where MaxPool found them", 2, 3, of_rank(),
        {key: _WINDOWS[key] for key in ("kernel_shape", "pads", "strides")},
    ),
    "onnx_roi_align": onnx(
        "RoiAlign", "bilinear samples of regions, pooled", 3, 3, _regions,
        {
            "coordinate_transformation_mode": "half_pixel or output_half_pixel",
            "mode": "avg or max",
            "output_height": "rows of a region",
            "output_width": "columns of a region",
            "sampling_ratio": "samples per output and axis; 0: adaptive",
            "spatial_scale": "from regions to x",
        },
    ),
    "onnx_max_roi_pool": onnx(
        "MaxRoiPool", "maxima of regions", 2, 2, _regions,
        {"pooled_shape": "rows and columns of a region", "spatial_scale": "from regions to x"},
    ),
}  # fmt: skip
