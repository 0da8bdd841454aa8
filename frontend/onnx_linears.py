"""Products with a constant matrix: MatMul and Gemm become `linear`, which NVFP4 and the kernels of
a checkpoint's linears then serve.
"""

from __future__ import annotations

from ..ir.graph import Op, Value
from ..ir.rewrite import Answer, Rewrite, Rule, View
from ..ir.types import Plain
from .onnx_match import Known, is_f32, last_extent, only_use, other, rank, source
from .onnx_names import OP_OF
from .onnx_tensors import Constant, transpose_of


def linear_rules(known: Known) -> list[Rule]:
    """Dense weights; in front of these, NVFP4 weights (onnx_nvfp4.py)."""
    return [
        Rule("linear of MatMul", (OP_OF.get("MatMul", ""),), lambda op, v: _mat_mul(op, v, known)),
        Rule("linear of Gemm", (OP_OF.get("Gemm", ""),), lambda op, v: _gemm(op, v, known)),
        Rule("bias of a linear", ("linear",), lambda op, v: _bias(op, v, known)),
    ]


def _mat_mul(op: Op, view: View, known: Known) -> Answer:
    x, w = op.args
    found = known.constant(w, view)
    if found is None:
        return None
    if len(found.shape) != 2:
        return f"its weight has {len(found.shape)} dimensions, expected a matrix"
    if found.shape[0] == 1:
        return "an outer product, of one input"
    if why := _unfit(x):
        return why
    weight_op, weight = _rows(w, view, known)
    linear, y = view.typed("linear", x, weight, type_=op.out.type, loc=op.loc, hint=op.out.name)
    return Rewrite(f"{weight.type}", (weight_op, linear), {op.out: y}, (op,))


def _unfit(x: Value) -> str | None:
    if not is_f32(x):
        return f"activations are {x.type.enc}, linears take f32"
    if rank(x) is None or rank(x) == 1 or last_extent(x) is None:
        return f"activations are {x.type}, expected two dimensions or more, the last known"
    return None


def _rows(w: Value, view: View, known: Known) -> tuple[Op, Value]:
    """The matrix [K, N] as [N, K]: as it was stored, where the graph transposed that."""
    found = known.constant(w, view)
    assert found is not None
    if found.flipped:
        return known.stored(found.flipped, view)
    rows = Constant(found.dtype, found.shape[::-1], transpose_of(found))
    return known.weight(rows, f"{source(w, view)}.T", view)


def _gemm(op: Op, view: View, known: Known) -> Answer:
    x, w = op.args[:2]
    found = known.constant(w, view)
    if found is None or len(found.shape) != 2:
        return None
    factors = op.get("alpha", 1.0), op.get("beta", 1.0), op.get("transA", 0)
    if factors != (1.0, 1.0, 0):
        return f"alpha, beta, transA are {factors}, expected 1, 1, 0"
    if why := _unfit(x):
        return why
    ops: list[Op] = []
    if op.get("transB", 0):
        weight = w
    else:
        weight_op, weight = _rows(w, view, known)
        ops.append(weight_op)
    operands = [x, weight]
    if len(op.args) == 3:
        bias = known.vector(op.args[2], weight.type.static[0], view)
        if bias is None:
            return f"adds {op.args[2].type}, expected a constant for each of {weight.type} rows"
        bias_op, value = known.weight(bias, f"{source(op.args[2], view)}.bias", view)
        ops.append(bias_op)
        operands.append(value)
    linear, y = view.typed("linear", *operands, type_=op.out.type, loc=op.loc, hint=op.out.name)
    return Rewrite(f"{weight.type}", (*ops, linear), {op.out: y}, (op,))


def _bias(op: Op, view: View, known: Known) -> Answer:
    """A constant added to each row of a linear that nobody else reads."""
    add = only_use(op.out, "Add", view)
    rows = last_extent(op.out)
    if add is None or len(op.args) == 3 or rows is None or op.out.type.enc != Plain("f32"):
        return None
    added = other(add, op.out)
    bias = known.vector(added, rows, view)
    if bias is None:
        return None
    if add.out.type.shape[-1:] != (rows,) or rank(add.out) != rank(op.out):
        return f"the sum is {add.out.type}, of another shape than {op.out.type}"
    bias_op, value = known.weight(bias, f"{source(added, view)}.bias", view)
    linear, y = view.typed(
        "linear", *op.args, value, type_=op.out.type, loc=op.loc, hint=add.out.name
    )
    return Rewrite("in its epilogue", (bias_op, linear), {add.out: y}, (op, add))
