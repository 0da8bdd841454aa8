"""Rules of phase 30 for ONNX graphs: what exporters spell out around the kernels we have.

The extents of such a graph are facts of a run. A rule that needs two to be equal proves it first
(onnx_extents.py), and where it cannot, says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.graph import Graph, Op, Value
from ..ir.ops_fused import role
from ..ir.rewrite import Answer, LogEntry, Rewrite, Rule, View, apply_rules
from .context import Context
from .linears import Fused
from .onnx_extents import ExtentTable

_SPLIT = (0, 2, 1, 3)
"""[batch, rows, heads, size] to [batch, heads, rows, size], and back."""


def fuse_onnx(graph: Graph, context: Context) -> tuple[Graph, list[LogEntry]]:
    """The graph with these rules applied, and what they did; each sees what the one before made."""
    log: list[LogEntry] = []
    for make in (_attention_rule, _gelu_rule, _residual_rule):
        graph, entries = apply_rules(graph, [make(ExtentTable(graph, context), context)])
        log.extend(entries)
    return graph, log


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Heads:
    """An operand of attention as it was before it was split into heads."""

    rows: Value  # [batch, rows, heads * size]
    count: int


def _attention_rule(extents: ExtentTable, context: Context) -> Rule:
    """Attention reads and writes rows [batch, rows, heads * size] itself: no transposes."""

    def apply(op: Op, view: View) -> Answer:
        if "q_num_heads" in op.attrs or len(op.args) > 4 or len(op.outs) > 1:
            return None
        found: list[_Heads] = []
        for name, v in zip("qkv", op.args, strict=False):
            heads = _unsplit(v, view, extents)
            if heads is None:
                return f"{name} is not made of rows by a Reshape to heads and a Transpose"
            found.append(heads)
        joined = _joined(op.out, view, extents)
        if joined is None:
            return "its result is not put back into rows by a Transpose and a Reshape"
        drop, y = joined
        q, k, v = found
        if k.count != v.count:
            return f"{k.count} heads of keys, {v.count} of values"
        attention, out = view.typed(
            op.name, q.rows, k.rows, v.rows, *op.args[3:], type_=y.type, loc=op.loc, hint=y.name,
            **op.attrs, q_num_heads=q.count, kv_num_heads=k.count,
        )  # fmt: skip
        return Rewrite(f"{q.count} heads in rows", (attention,), {y: out}, (op, *drop))

    return Rule("attention over rows", ("onnx_attention",), apply)


def _unsplit(v: Value, view: View, extents: ExtentTable) -> _Heads | None:
    turn = view.producer(v, "onnx_transpose")
    split = view.producer(turn.args[0], "onnx_reshape") if turn is not None else None
    if turn is None or split is None or turn.ints("perm") != _SPLIT:
        return None
    rows, heads = extents.of(split.args[0]), extents.of(split.out)
    if rows is None or heads is None or len(rows) != 3 or rows[:2] != heads[:2]:
        return None
    return _Heads(split.args[0], heads[2]) if isinstance(heads[2], int) else None


def _joined(v: Value, view: View, extents: ExtentTable) -> tuple[tuple[Op, ...], Value] | None:
    """The ops that put heads back into rows, and the rows."""
    turn = view.only_use(v)
    if turn is None or turn.name != "onnx_transpose" or turn.ints("perm") != _SPLIT:
        return None
    readers = [op for op in view.uses(turn.out) if op.name != "onnx_shape"]
    if len(readers) != 1 or readers[0].name != "onnx_reshape" or turn.out in view.graph.outs:
        return None
    join = readers[0]
    apart, rows = extents.of(turn.out), extents.of(join.out)
    if apart is None or rows is None or len(rows) != 3 or rows[:2] != apart[:2]:
        return None
    return (join,), join.out


# --- linears --------------------------------------------------------------------------------------


def _gelu_rule(extents: ExtentTable, context: Context) -> Rule:
    """gelu(linear(x)) where the product is written, if the target has a kernel that does it."""

    def apply(op: Op, view: View) -> Answer:
        linear = view.producer(op.args[0], "fused_linear")
        if linear is None or op.attrs.get("approximate", "none") != "none":
            return None
        fused = Fused.of(linear)
        if fused.epilogue != "none" or "residual" in fused.roles:
            return f"{linear.loc} does something else behind its product"
        if view.only_use(linear.out) is None:
            return f"{linear.loc} has other readers"
        grown, y = replace(fused, epilogue="gelu").make(view)
        if not _is_served(grown, context):
            return f"no linear kernel of {context.target.name} has it as its epilogue"
        return Rewrite(f"behind {linear.loc}", (grown,), {op.out: y}, (linear, op))

    return Rule("linear + gelu", ("onnx_gelu",), apply)


def _is_served(op: Op, context: Context) -> bool:
    target = context.target
    kernels = [k for k in context.kernels if op.name in k.serves and k.needs <= target.features]
    return any(kernel.refuses(op, target.buckets[-1]) is None for kernel in kernels)


def _residual_rule(extents: ExtentTable, context: Context) -> Rule:
    """residual + linear(x), where both are of one shape: the sum is made as the product is."""

    def apply(op: Op, view: View) -> Answer:
        for i in (1, 0):
            linear, other = view.producer(op.args[i], "fused_linear"), op.args[1 - i]
            if linear is None:
                continue
            if role(linear, "residual") is not None or view.only_use(linear.out) is None:
                return f"{linear.loc} has a residual already, or other readers"
            if not extents.same(linear.out, other):
                return f"{other.type} is not known to be of the shape of {linear.out.type}"
            fused, y = Fused.of(linear).with_role("residual", other).make(view)
            if not _is_served(fused, context):
                return f"no linear kernel of {context.target.name} adds a residual"
            return Rewrite(f"adds into {linear.loc}", (fused,), {op.out: y}, (linear, op))
        return None

    return Rule("linear + residual", ("onnx_add",), apply)
