"""32: activations and caches in the dtype the target's matrix units read.

The residual stream and the logits stay f32 (sums of many layers, and what sampling compares); what
a linear or attention reads is rounded once, where it is made. On a target that computes in f32
nothing changes.
"""

from __future__ import annotations

from ..ir.errors import IRError
from ..ir.graph import Graph, Op, Value
from ..ir.ops import infer
from ..ir.ops_fused import role
from ..ir.rewrite import LogEntry
from ..ir.target import Target
from ..ir.types import Plain
from .context import Context, Outcome
from .launches import launched
from .onnx_lifetimes import is_onnx

STREAM = ("embed", "add", "take_rows")
"""Ops whose results are the residual stream, besides linears that add to it."""


def _is_stream(op: Op, graph: Graph) -> bool:
    if op.out in graph.outs or op.name in STREAM:
        return True
    return op.name == "fused_linear" and role(op, "residual") is not None


def _retyped(op: Op, by: dict[Value, Value], out: str, target: Target) -> Op:
    """The op on the new values, its results typed anew under the same names."""
    args = tuple(by.get(v, v) for v in op.args)
    if op.name == "state":
        enc = Plain(target.activation, target.cache_layout)
        new = Op(op.name, args, (Value(op.out.name, op.out.type.with_enc(enc)),), op.attrs, op.loc)
    else:
        new = Op(op.name, args, (), {**op.attrs, **({"out": out} if out else {})}, op.loc)
        types = infer(new)
        new.outs = tuple(Value(v.name, t) for v, t in zip(op.outs, types, strict=True))
    by.update(zip(op.outs, new.outs, strict=True))
    return new


def run(graph: Graph, context: Context) -> Outcome:
    target = context.target
    if target.activation == "f32":
        return Outcome(graph)
    running, by = set(launched(graph)), dict[Value, Value]()
    ops: list[Op] = []
    log: list[LogEntry] = []
    for op in graph.ops:
        if op.name != "state" and op not in running:
            ops.append(op)
            continue
        narrow = op in running and not _is_stream(op, graph)
        ops.append(_retyped(op, by, target.activation if narrow else "", target))
        if narrow:
            log.append(LogEntry("activation", op.loc, True, str(ops[-1].out.type)))
    return Outcome(graph.with_ops(ops, [by.get(v, v) for v in graph.outs]), tuple(log))


def ensures(graph: Graph, context: Context) -> None:
    """Every cache has the target's dtype and layout; logits (not ONNX outputs) are f32."""
    wanted = Plain(context.target.activation, context.target.cache_layout)
    for op in graph.ops:
        if op.name == "state" and op.out.type.enc != wanted:
            raise IRError(f"32_activation_dtype: {op.out} is {op.out.type.enc}, expected {wanted}")
    for v in graph.outs:
        if not is_onnx(graph) and v.type.enc != Plain("f32"):
            raise IRError(f"32_activation_dtype: logits are {v.type.enc}")
