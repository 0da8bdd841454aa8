"""32: activations and caches in the dtype the target's matrix units read.

The residual stream and the logits stay f32 (sums of many layers, and what sampling compares); what
a linear or attention reads is rounded once, where it is made. On a target that computes in f32
nothing changes. A KV cache in FP8 stays one where the target has kernels that read it; elsewhere it
is kept as activations are, and its scales are dropped.
"""

from __future__ import annotations

from ..ir.errors import IRError, TargetError
from ..ir.graph import Graph, Op, Value
from ..ir.ops import infer
from ..ir.ops_fused import role
from ..ir.rewrite import LogEntry
from ..ir.target import Target
from ..ir.types import FP8_CACHE, QUANTISED_CACHES, Plain
from .context import Context, Outcome
from .launches import launched
from .onnx_lifetimes import is_onnx

STREAM = ("embed", "add", "take_rows")
"""Ops whose results are the residual stream, besides linears that add to it."""

_CACHE_SCALES = ("cache_scale", "k_scale", "v_scale")


def _is_stream(op: Op, graph: Graph) -> bool:
    if op.out in graph.outs or op.name in STREAM:
        return True
    return op.name == "fused_linear" and role(op, "residual") is not None


def _is_fp8_cache(op: Op) -> bool:
    return op.name == "state" and op.out.type.enc in QUANTISED_CACHES


def _cache_encodings(target: Target) -> tuple[Plain, ...]:
    """How a cache may lie on the target: as activations, and in FP8 where it has kernels."""
    dtypes = (target.activation, *([FP8_CACHE] if target.fp8_cache else []))
    return tuple(Plain(dtype, target.cache_layout) for dtype in dtypes)


def _retyped(op: Op, by: dict[Value, Value], out: str, target: Target) -> Op:
    """The op on the new values, its results typed anew under the same names."""
    args = tuple(by.get(v, v) for v in op.args)
    if op.name == "state":
        enc = _cache_encodings(target)[-1 if _is_fp8_cache(op) else 0]
        new = Op(op.name, args, (Value(op.out.name, op.out.type.with_enc(enc)),), op.attrs, op.loc)
    else:
        attrs = {**op.attrs, **({"out": out} if out else {})}
        if not target.fp8_cache:
            attrs = {name: value for name, value in attrs.items() if name not in _CACHE_SCALES}
        new = Op(op.name, args, (), attrs, op.loc)
        types = infer(new)
        new.outs = tuple(Value(v.name, t) for v, t in zip(op.outs, types, strict=True))
    by.update(zip(op.outs, new.outs, strict=True))
    return new


def run(graph: Graph, context: Context) -> Outcome:
    target = context.target
    in_fp8 = any(map(_is_fp8_cache, graph.ops))
    if in_fp8 and not target.fp8_cache:
        graph = _without_fp8(graph, context)
    elif target.activation == "f32":
        return Outcome(graph)
    running, by = set(launched(graph)), dict[Value, Value]()
    ops: list[Op] = []
    log: list[LogEntry] = []
    for op in graph.ops:
        if op.name != "state" and op not in running:
            ops.append(op)
            continue
        narrow = target.activation != "f32" and op in running and not _is_stream(op, graph)
        ops.append(_retyped(op, by, target.activation if narrow else "", target))
        if _is_fp8_cache(op):
            log.append(_cache_entry(op, ops[-1], graph))
        if narrow:
            log.append(LogEntry("activation", op.loc, True, str(ops[-1].out.type)))
    return Outcome(graph.with_ops(ops, [by.get(v, v) for v in graph.outs]), tuple(log))


def _without_fp8(graph: Graph, context: Context) -> Graph:
    """The graph with the reason why its caches will not be FP8. Raises TargetError if they must."""
    name, kept = context.target.name, context.target.activation
    if context.needs_fp8_cache:
        raise TargetError(
            f"--kv-cache fp8: {name} has no kernels that read an FP8 KV cache; compile with "
            f"--kv-cache auto, which keeps it in {kept} there, or for another target"
        )
    why = f"{graph.attrs.get('kv_cache', '')}; {name} has no kernels that read it"
    return graph.with_attrs(kv_cache=why.removeprefix("; "))


def _cache_entry(before: Op, after: Op, graph: Graph) -> LogEntry:
    stays = _is_fp8_cache(after)
    why = f"{after.out.type.enc}: {graph.attrs.get('kv_cache', '')}"
    return LogEntry("fp8 cache", before.get("source", ""), stays, why)


def ensures(graph: Graph, context: Context) -> None:
    """Every cache has a dtype and the layout of the target; logits (not ONNX outputs) are f32."""
    wanted = _cache_encodings(context.target)
    for op in graph.ops:
        if op.name == "state" and op.out.type.enc not in wanted:
            expected = " or ".join(map(str, wanted))
            raise IRError(
                f"32_activation_dtype: {op.out} is {op.out.type.enc}, expected {expected}"
            )
    for v in graph.outs:
        if not is_onnx(graph) and v.type.enc != Plain("f32"):
            raise IRError(f"32_activation_dtype: logits are {v.type.enc}")
