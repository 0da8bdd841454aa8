"""ONNX operators that make one value of many: reductions along axes, positions of extremes, running
sums, the largest few, the distinct ones."""

from __future__ import annotations

from .errors import IRError
from .graph import Op
from .onnx_ops import Shape, dtype, is_given, like, onnx, shape, typed
from .opdef import OpDef
from .types import UNKNOWN, TensorType

_REDUCE = {"keepdims": "reduced axes stay, of extent 1; 1", "noop_with_empty_axes": "0"}


def _reduced(op: Op) -> TensorType:
    """Operand 0 without the axes that operand 1 lists: all of them where it is left out."""
    found = shape(op, 0)
    keep = op.get("keepdims", 1) != 0
    if found is None:
        return typed(dtype(op, 0), None)
    if is_given(op, 1):
        return typed(dtype(op, 0), (UNKNOWN,) * len(found) if keep else None)
    if op.get("noop_with_empty_axes", 0):
        return typed(dtype(op, 0), found)
    return typed(dtype(op, 0), (1,) * len(found) if keep else ())


def axis_of(op: Op, default: int, rank: int) -> int:
    """The attribute `axis`, counted from the front. Raises IRError where there is no such axis."""
    axis = op.get("axis", default)
    if not -rank <= axis < rank:
        raise IRError(f"{op.name}: axis {axis} of a tensor of rank {rank}")
    return axis % rank


def _replaced(found: Shape, axis: int, *by: int | str) -> Shape:
    return found[:axis] + by + found[axis + 1 :]


def _position(op: Op) -> TensorType:
    found = shape(op, 0)
    if found is None:
        return typed("i64", None)
    axis = axis_of(op, 0, len(found))
    return typed("i64", _replaced(found, axis, *((1,) if op.get("keepdims", 1) else ())))


def _top_k(op: Op) -> tuple[TensorType, TensorType]:
    found = shape(op, 0)
    if found is not None:
        found = _replaced(found, axis_of(op, -1, len(found)), UNKNOWN)
    return typed(dtype(op, 0), found), typed("i64", found)


def _unique(op: Op) -> tuple[TensorType, ...]:
    found = shape(op, 0)
    if "axis" not in op.attrs:
        found = (UNKNOWN,)
    elif found is not None:
        found = _replaced(found, axis_of(op, 0, len(found)), UNKNOWN)
    return typed(dtype(op, 0), found), *(typed("i64", (UNKNOWN,)),) * 3


def _selected_boxes(op: Op) -> TensorType:
    return typed("i64", (UNKNOWN, 3))


_CUMULATIVE = {"exclusive": "without the element itself; 0", "reverse": "from the end; 0"}
_ARG = {
    "axis": "0",
    "keepdims": "the axis stays, of extent 1; 1",
    "select_last_index": "the last of equal ones; 0",
}
_TOP_K = {"axis": "-1", "largest": "or smallest; 1", "sorted": "by value; 1"}
_UNIQUE = {"axis": "slices along it; all elements where absent", "sorted": "ascending; 1"}
_BOXES = {"center_point_box": "1: boxes are centre and size, 0: two corners"}

# fmt: off
OPS: dict[str, OpDef] = {
    "onnx_reduce_sum": onnx("ReduceSum", "sum", 1, 2, _reduced, _REDUCE),
    "onnx_reduce_mean": onnx("ReduceMean", "arithmetic mean", 1, 2, _reduced, _REDUCE),
    "onnx_reduce_max": onnx("ReduceMax", "largest", 1, 2, _reduced, _REDUCE),
    "onnx_reduce_min": onnx("ReduceMin", "smallest", 1, 2, _reduced, _REDUCE),
    "onnx_reduce_prod": onnx("ReduceProd", "product", 1, 2, _reduced, _REDUCE),
    "onnx_reduce_l1": onnx("ReduceL1", "sum of magnitudes", 1, 2, _reduced, _REDUCE),
    "onnx_reduce_l2": onnx("ReduceL2", "root of the sum of squares", 1, 2, _reduced, _REDUCE),
    "onnx_reduce_sum_square": onnx("ReduceSumSquare", "sum of squares", 1, 2, _reduced, _REDUCE),
    "onnx_reduce_log_sum": onnx("ReduceLogSum", "log of the sum", 1, 2, _reduced, _REDUCE),
    "onnx_reduce_log_sum_exp": onnx("ReduceLogSumExp", "log of the sum of e^x", 1, 2, _reduced,
                                    _REDUCE),
    "onnx_arg_max": onnx("ArgMax", "where the largest along an axis is", 1, 1, _position, _ARG),
    "onnx_arg_min": onnx("ArgMin", "where the smallest along an axis is", 1, 1, _position, _ARG),
    "onnx_cum_sum": onnx("CumSum", "running sum along an axis", 2, 2, like(), _CUMULATIVE),
    "onnx_cum_prod": onnx("CumProd", "running product along an axis", 2, 2, like(), _CUMULATIVE),
    "onnx_top_k": onnx("TopK", "the k largest along an axis, and where they are", 2, 2, _top_k,
                       _TOP_K),
    "onnx_unique": onnx("Unique", "distinct elements or slices, first positions, inverse, counts",
                        1, 1, _unique, _UNIQUE),
    "onnx_non_max_suppression": onnx("NonMaxSuppression", "boxes that overlap no better one: batch,"
                                     " class, box", 2, 5, _selected_boxes, _BOXES),
}
# fmt: on
