"""ONNX operators that move elements and do not compute: shapes, parts, indices."""

from __future__ import annotations

from .errors import IRError
from .graph import Op
from .onnx_ops import (
    MANY,
    Shape,
    dtype,
    is_given,
    like,
    numbered,
    of_rank,
    onnx,
    shape,
    typed,
    unranked,
)
from .opdef import OpDef
from .types import UNKNOWN, Dim, TensorType

# --- type rules -----------------------------------------------------------------------------------


def _axis(axis: int, rank: int, op: Op) -> int:
    """`axis` counted from the front. Raises IRError where it is out of range."""
    if not -rank <= axis < rank:
        raise IRError(f"{op.name}: axis is {axis}, expected one of {rank} axes")
    return axis % rank


def _product(dims: Shape) -> Dim:
    count = 1
    for dim in dims:
        if not isinstance(dim, int):
            return UNKNOWN
        count *= dim
    return count


def _flatten(op: Op) -> TensorType:
    dims = shape(op, 0)
    if dims is None:
        return typed(dtype(op, 0), (UNKNOWN, UNKNOWN))
    axis = op.get("axis", 1)
    cut = axis if axis >= 0 else axis + len(dims)
    return typed(dtype(op, 0), (_product(dims[:cut]), _product(dims[cut:])))


def _transpose(op: Op) -> TensorType:
    dims, perm = shape(op, 0), op.ints("perm")
    if dims is None:
        return typed(dtype(op, 0), None)
    order = perm or tuple(reversed(range(len(dims))))
    if sorted(order) != list(range(len(dims))):
        raise IRError(f"{op.name}: perm is {order}, expected a permutation of {len(dims)} axes")
    return typed(dtype(op, 0), tuple(dims[i] for i in order))


def _concat(op: Op) -> TensorType:
    shapes = [shape(op, i) for i in range(len(op.args))]
    known = [dims for dims in shapes if dims is not None]
    if not known:
        return typed(dtype(op, 0), None)
    rank = len(known[0])
    if any(len(dims) != rank for dims in known):
        raise IRError(f"{op.name}: operands have {sorted({len(d) for d in known})} axes")
    axis = _axis(op.get("axis", 0), rank, op)
    along = [dims[axis] for dims in known]
    total: Dim = UNKNOWN
    if len(known) == len(shapes) and all(isinstance(dim, int) for dim in along):
        total = sum(dim for dim in along if isinstance(dim, int))
    out = [_same([dims[i] for dims in known]) for i in range(rank)]
    out[axis] = total
    return typed(dtype(op, 0), tuple(out))


def _same(dims: list[Dim]) -> Dim:
    """An extent that all agree on: a number, where one is known."""
    return next((dim for dim in dims if isinstance(dim, int)), dims[0])


def _split(op: Op) -> tuple[TensorType, ...]:
    dims = shape(op, 0)
    if dims is not None:
        axis = _axis(op.get("axis", 0), len(dims), op)
        dims = (*dims[:axis], UNKNOWN, *dims[axis + 1 :])
    return (typed(dtype(op, 0), dims),) * max(len(op.outs), MOST_PARTS)


MOST_PARTS = 64
"""Results of a Split; as the kernel has it (Ints::kMost)."""


def _gather(op: Op) -> TensorType:
    dims, indices = shape(op, 0), shape(op, 1)
    if dims is None or indices is None:
        return typed(dtype(op, 0), None)
    axis = _axis(op.get("axis", 0), len(dims), op)
    return typed(dtype(op, 0), (*dims[:axis], *indices, *dims[axis + 1 :]))


def _gather_elements(op: Op) -> TensorType:
    return typed(dtype(op, 0), shape(op, 1))


def _gather_nd(op: Op) -> TensorType:
    dims, indices = shape(op, 0), shape(op, 1)
    if dims is None or indices is None or not indices or not isinstance(indices[-1], int):
        return typed(dtype(op, 0), None)
    return typed(dtype(op, 0), (*indices[:-1], *dims[op.get("batch_dims", 0) + indices[-1] :]))


def _one_hot(op: Op) -> TensorType:
    indices = shape(op, 0)
    if indices is None:
        return typed(dtype(op, 2), None)
    axis = _axis(op.get("axis", -1), len(indices) + 1, op)
    return typed(dtype(op, 2), (*indices[:axis], UNKNOWN, *indices[axis:]))


def _eye_like(op: Op) -> TensorType:
    return typed(numbered(op, "dtype", dtype(op, 0)), shape(op, 0))


def _constant_of_shape(op: Op) -> TensorType:
    return typed(dtype(op, 1) if is_given(op, 1) else "f32", None)


def _vector(op: Op) -> TensorType:
    return typed(dtype(op, 0), (UNKNOWN,))


def _shape(op: Op) -> TensorType:
    dims = shape(op, 0)
    if dims is None:
        return typed("i64", (UNKNOWN,))
    end = op.get("end", len(dims))
    return typed("i64", (len(dims[op.get("start", 0) : end]),))


def _size(op: Op) -> TensorType:
    return typed("i64", ())


def _non_zero(op: Op) -> TensorType:
    dims = shape(op, 0)
    return typed("i64", (UNKNOWN if dims is None else len(dims), UNKNOWN))


def _compress(op: Op) -> TensorType:
    if "axis" not in op.attrs:
        return _vector(op)
    return of_rank()(op)


def _image(op: Op) -> TensorType:
    return typed(dtype(op, 0), (UNKNOWN,) * 4)


# --- entries --------------------------------------------------------------------------------------

_AXIS = {"axis": "the axis"}
_BLOCK = {"blocksize": "rows and columns of a block", "mode": "DCR or CRD: where its index stands"}
_REDUCTION = {"reduction": "none, add, mul, max or min: what becomes of two for one place"}

_VIEWS: dict[str, OpDef] = {
    "onnx_identity": onnx("Identity", "x", 1, 1, like()),
    "onnx_reshape": onnx(
        "Reshape", "x under another shape", 2, 2, unranked(), {"allowzero": "0: 0 keeps an extent"}
    ),
    "onnx_flatten": onnx("Flatten", "x as a matrix", 1, 1, _flatten, {"axis": "first of columns"}),
    "onnx_squeeze": onnx("Squeeze", "x without axes of extent 1", 1, 2, unranked()),
    "onnx_unsqueeze": onnx("Unsqueeze", "x with further axes of extent 1", 2, 2, unranked()),
    "onnx_shape": onnx(
        "Shape", "the extents of x", 1, 1, _shape, {"start": "first axis", "end": "behind the last"}
    ),
    "onnx_size": onnx("Size", "the number of elements of x", 1, 1, _size),
}

_PARTS: dict[str, OpDef] = {
    "onnx_transpose": onnx(
        "Transpose", "axes in another order", 1, 1, _transpose, {"perm": "the order; or reversed"}
    ),
    "onnx_depth_to_space": onnx("DepthToSpace", "channels to blocks", 1, 1, _image, _BLOCK),
    "onnx_space_to_depth": onnx("SpaceToDepth", "blocks to channels", 1, 1, _image, _BLOCK),
    "onnx_concat": onnx("Concat", "operands behind each other", 1, MANY, _concat, _AXIS),
    "onnx_split": onnx(
        "Split", "x in parts", 1, 2, _split, {**_AXIS, "num_outputs": "parts, where none are given"}
    ),
    "onnx_slice": onnx("Slice", "x[starts:ends:steps] along axes", 3, 5, of_rank()),
    "onnx_expand": onnx("Expand", "x broadcast to a shape", 2, 2, unranked()),
    "onnx_tile": onnx("Tile", "x repeated along each axis", 2, 2, of_rank()),
    "onnx_trilu": onnx("Trilu", "a triangle of x", 1, 2, like(), {"upper": "1: above k, or below"}),
    "onnx_pad": onnx(
        "Pad", "x with margins", 2, 4, of_rank(), {"mode": "constant, reflect, edge or wrap"}
    ),
    "onnx_center_crop_pad": onnx(
        "CenterCropPad", "the middle of x, or x in zeros", 2, 2, of_rank(), {"axes": "which; all"}
    ),
    "onnx_reverse_sequence": onnx(
        "ReverseSequence", "the first elements of each sequence in reverse", 2, 2, like(),
        {"batch_axis": "0 or 1", "time_axis": "the other one"},
    ),
}  # fmt: skip

_INDEXED: dict[str, OpDef] = {
    "onnx_gather": onnx("Gather", "x at indices of an axis", 2, 2, _gather, _AXIS),
    "onnx_gather_elements": onnx(
        "GatherElements", "for each index an element of x", 2, 2, _gather_elements, _AXIS
    ),
    "onnx_gather_nd": onnx(
        "GatherND", "x at tuples of indices", 2, 2, _gather_nd, {"batch_dims": "axes in common"}
    ),
    "onnx_scatter_elements": onnx(
        "ScatterElements", "x with an update for each index", 3, 3, like(), {**_AXIS, **_REDUCTION}
    ),
    "onnx_scatter": onnx("Scatter", "ScatterElements, by its old name", 3, 3, like(), _AXIS),
    "onnx_scatter_nd": onnx("ScatterND", "x with updates at tuples", 3, 3, like(), _REDUCTION),
    "onnx_tensor_scatter": onnx(
        "TensorScatter", "a cache with new rows in each batch", 2, 3, like(),
        {**_AXIS, "mode": "linear, or circular"},
    ),
    "onnx_compress": onnx("Compress", "x where a condition holds", 2, 2, _compress, _AXIS),
    "onnx_non_zero": onnx("NonZero", "indices of what is not 0", 1, 1, _non_zero),
}  # fmt: skip

_MADE: dict[str, OpDef] = {
    "onnx_one_hot": onnx(
        "OneHot", "for each index a row with one element on", 3, 3, _one_hot, _AXIS
    ),
    "onnx_eye_like": onnx(
        "EyeLike", "ones on a diagonal", 1, 1, _eye_like,
        {"k": "which diagonal", "dtype": "number of the result's dtype"},
    ),
    "onnx_range": onnx(
        "Range", "start, start + delta, ... before limit", 3, 3, _vector,
        {"stash_type": "number of the dtype that narrow floats are computed in"},
    ),
    "onnx_constant_of_shape": onnx(
        "ConstantOfShape", "a value (operand 1) in every element", 1, 2, _constant_of_shape
    ),
}  # fmt: skip

OPS: dict[str, OpDef] = {**_VIEWS, **_PARTS, **_INDEXED, **_MADE}
