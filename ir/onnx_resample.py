"""ONNX operators that read images between their elements: Resize, GridSample."""

from __future__ import annotations

from .graph import Op
from .onnx_ops import dtype, of_rank, onnx, shape, typed
from .opdef import OpDef
from .types import TensorType


def _grid_sample(op: Op) -> TensorType:
    """[batch and channels of operand 0, the grid's spatial extents]."""
    x, grid = shape(op, 0), shape(op, 1)
    if x is None or grid is None or len(x) < 2:
        return typed(dtype(op, 0), None)
    return typed(dtype(op, 0), (*x[:2], *grid[1:-1]))


OPS: dict[str, OpDef] = {
    "onnx_resize": onnx(
        "Resize", "samples of x by scales or sizes, axis by axis", 1, 4, of_rank(),
        {
            "antialias": "1: filters grow with what they shrink",
            "axes": "that roi, scales and sizes are about",
            "coordinate_transformation_mode": "from outputs to positions in x",
            "cubic_coeff_a": "of the cubic filter",
            "exclude_outside": "1: taps outside have no weight",
            "extrapolation_value": "outside of x, for tf_crop_and_resize",
            "keep_aspect_ratio_policy": "stretch, not_larger or not_smaller",
            "mode": "nearest, linear or cubic",
            "nearest_mode": "round_prefer_floor, round_prefer_ceil, floor or ceil",
        },
    ),
    "onnx_grid_sample": onnx(
        "GridSample", "samples of x at the points of a grid", 2, 2, _grid_sample,
        {
            "align_corners": "1: -1 and 1 are centres of elements, not edges",
            "mode": "nearest, linear or cubic",
            "padding_mode": "zeros, border or reflection",
        },
    ),
}  # fmt: skip
