"""NVFP4 in ONNX, as ModelOpt exports it, in the words of a checkpoint: phase 10 then promotes it.

A weight [N, K] is two nodes:

    DequantizeLinear(block scales e4m3 [N, K/16], global scale) -> s
    DequantizeLinear(codes e2m1 [N, K], s) {axis=-1, block_size=16} -> [Cast] -> Transpose -> MatMul

and activations, where they are 4-bit too, are

    TRT_FP4DynamicQuantize(x, global scale) -> codes, block scales
    DequantizeLinear(block scales, global scale) -> s
    DequantizeLinear(codes, s) {axis=-1, block_size=16} -> [Cast] -> MatMul

Scales multiply. The global scale is f32, f16 or bf16. The casts to f16 or bf16 around a product are
how TensorRT types it, also in f32 models: a linear of ours takes f32 and rounds its result.
Reference: nvidia-modelopt 0.47, onnx/export/nvfp4_exporter.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from ..ir.graph import Op, Value
from ..ir.rewrite import Answer, Rewrite, Rule, View
from ..ir.types import Plain
from .onnx_facades import BLOCK
from .onnx_graph import FP4_DYNAMIC_OP
from .onnx_match import Known, dtype, last_extent, made_by, rank, source
from .onnx_names import OP_OF
from .onnx_tensors import ONNX_DTYPES, Constant
from .tensor_info import Array

HALVES = ("f16", "bf16")
GLOBAL_DTYPES = ("f32", *HALVES)


def nvfp4_rules(known: Known) -> list[Rule]:
    """Activations first, so that a linear finds them as `quantize_dequantize`."""
    root = OP_OF.get("DequantizeLinear", "")
    product = (OP_OF.get("MatMul", ""), OP_OF.get("Gemm", ""))
    return [
        Rule("nvfp4 activations", (root,), lambda op, v: _activations(op, v, known)),
        Rule("nvfp4 weight", product, lambda op, v: _linear(op, v, known)),
    ]


def _activations(op: Op, view: View, known: Known) -> Answer:
    """A dynamic quantiser and what reads it back."""
    quantise = view.producer(op.args[0], FP4_DYNAMIC_OP)
    if quantise is None:
        return None
    scales = made_by(op.args[1], "DequantizeLinear", view)
    if scales is None or scales.args[0] is not quantise.outs[1] or not _in_blocks(op):
        return "its codes are not read back with its own block scales"
    x, scale = quantise.args
    ours, theirs = known.scalar(scale, view), known.scalar(scales.args[1], view)
    if ours is None or ours != theirs:
        return f"quantised by {ours} and read back by {theirs}, expected one constant"
    scale_op, value = _global(scale, view, known)
    into, x32 = _as(x, "f32", view)
    out = view.typed(
        "quantize_dequantize", x32, value, type_=x32.type, loc=op.loc, hint="x", format="nvfp4"
    )
    back, y = _as(out[1], dtype(op.out), view)
    return Rewrite("W4A4", (scale_op, *into, out[0], *back), {op.out: y}, (op,))


def _in_blocks(op: Op) -> bool:
    last = (rank(op.args[0]) or 0) - 1
    return op.get("block_size", 0) == BLOCK and op.get("axis", 1) in (-1, last)


def _global(v: Value, view: View, known: Known) -> tuple[Op, Value]:
    """A scale of one element as an f32 scalar."""
    found = known.constant(v, view)
    op = view.producer(v, "weight")
    assert found is not None and op is not None

    def load() -> Array:
        return found.load().astype(np.float32).reshape(())

    return known.weight(Constant("f32", (), load), f"{op.get('source', '')}.f32", view)


def _as(v: Value, to: str, view: View) -> tuple[tuple[Op, ...], Value]:
    """The value in another dtype, and the op that casts it there."""
    if dtype(v) == to:
        return (), v
    type_ = v.type.with_enc(Plain(to))
    op, value = view.typed(OP_OF["Cast"], v, type_=type_, hint=f"{v.name}.{to}", to=ONNX_DTYPES[to])
    return (op,), value


# --- weights --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Weight:
    """The three parts of an NVFP4 weight: values of `weight` ops."""

    codes: Value
    scales: Value
    factor: Value


def _linear(op: Op, view: View, known: Known) -> Answer:
    found = _weight(op, view, known)
    if found is None or isinstance(found, str):
        return found
    x, out = op.args[0], op.out
    codes = known.constant(found.codes, view)
    assert codes is not None and codes.packed is not None
    n, k = codes.shape
    if last_extent(x) != k or dtype(x) not in GLOBAL_DTYPES:
        return f"its activations are {x.type}, expected [.., {k}] of f32, f16 or bf16"
    added = next(iter(op.args[2:]), None)
    bias = known.vector(added, n, view) if added is not None else None
    if added is not None and (bias is None or bias.dtype != "f32"):
        return f"it adds {added.type}, expected an f32 constant for each output"
    packed = codes.packed
    parts = [
        known.weight(
            Constant("u8", (n, k // 2), lambda: packed().reshape(n, k // 2)),
            f"{source(found.codes, view)}.packed", view,
        ),
        known.stored(source(found.scales, view), view),
        _global(found.factor, view, known),
    ]  # fmt: skip
    if added is not None and bias is not None:
        parts.append(known.weight(bias, f"{source(added, view)}.bias", view))
    values = [value for _, value in parts]
    made = view.typed(
        "dequantize", *values[:3], type_=codes.type.with_enc(Plain("f32")), loc=op.loc, hint="w",
        format="nvfp4",
    )  # fmt: skip
    into, x32 = _as(_uncast(x, view), "f32", view)
    y = view.typed(
        "linear",
        x32,
        made[1],
        *values[3:],
        type_=out.type.with_enc(Plain("f32")),
        loc=op.loc,
        hint=out.name,
    )
    back, result = _as(y[1], dtype(out), view)
    ops = (*(o for o, _ in parts), made[0], *into, y[0], *back)
    return Rewrite(f"e2m1 [{n}, {k}], block scales, global scale", ops, {out: result}, (op,))


def _uncast(x: Value, view: View) -> Value:
    """What a cast to a half type was made of, where that was f32."""
    cast = made_by(x, "Cast", view)
    return cast.args[0] if cast is not None and dtype(cast.args[0]) == "f32" else x


def _weight(op: Op, view: View, known: Known) -> _Weight | str | None:
    """The weight behind operand 1; why it is none, if it looks like one; None if it does not."""
    v, flipped = op.args[1], False
    while (step := made_by(v, "Cast", view) or made_by(v, "Transpose", view)) is not None:
        if step.name == OP_OF["Transpose"]:
            flipped = not flipped
        elif step.get("to", 0) not in (TensorProto.FLOAT, *(ONNX_DTYPES[h] for h in HALVES)):
            return None
        v = step.args[0]
    values = made_by(v, "DequantizeLinear", view)
    if values is None or dtype(values.args[0]) != "f4e2m1":
        return None
    flipped ^= bool(op.get("transB", 0))
    if not flipped:
        return "its weight is not transposed: blocks must lie along the inputs"
    if (op.get("alpha", 1.0), op.get("beta", 1.0), op.get("transA", 0)) != (1.0, 1.0, 0):
        return "a Gemm with factors"
    scales = made_by(values.args[1], "DequantizeLinear", view)
    if scales is None or len(values.args) > 2 or len(scales.args) > 2:
        return "its block scales are not dequantised, or there are zero points"
    return _checked(values, scales, view, known)


def _checked(values: Op, scales: Op, view: View, known: Known) -> _Weight | str:
    codes, block = known.constant(values.args[0], view), known.constant(scales.args[0], view)
    factor = known.constant(scales.args[1], view)
    if codes is None or block is None or factor is None or codes.packed is None:
        return "its codes or scales are no constants of the file"
    if len(codes.shape) != 2 or codes.shape[1] % BLOCK or not _in_blocks(values):
        return (
            f"codes {list(codes.shape)} in blocks of {values.get('block_size', 0)} along axis "
            f"{values.get('axis', 1)}, expected a matrix in blocks of 16 along its last axis"
        )
    n, k = codes.shape
    if (block.dtype, block.shape) != ("f8e4m3", (n, k // BLOCK)):
        return f"block scales {block.type}, expected f8e4m3 {[n, k // BLOCK]}"
    if factor.count != 1 or factor.dtype not in GLOBAL_DTYPES:
        return f"global scale {factor.type}, expected one of f32, f16 or bf16"
    return _Weight(values.args[0], scales.args[0], scales.args[1])
