"""35: every op names its kernel for every bucket, by table order and declared constraints.

A refused candidate leaves its reason. An op without a kernel is an error, and a fallback is one too
unless the user allowed it by name: no slow path is ever silent.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import IRError
from ..ir.graph import Graph, Op
from ..ir.kernel import KernelDecl, Refused
from ..ir.ops_model import LOGITS_ROWS
from ..ir.rewrite import LogEntry
from ..ir.target import Target
from .context import Context, Outcome
from .launches import launched
from .onnx_lifetimes import is_onnx
from .onnx_placement import SIDES, placed
from .unserved import UnservedError, gathered


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel of one op in one bucket, and the candidates refused before it."""

    op: Op
    bucket: int
    kernel: KernelDecl
    refused: tuple[Refused, ...]


def rows_in(op: Op, bucket: int, target: Target) -> int:
    """Rows the op is chosen for: the bucket's tokens; for logits, one for each sequence."""
    is_logits = op.out.type.count == LOGITS_ROWS
    return 1 if is_logits and bucket > target.sequences else bucket


def _refusal(kernel: KernelDecl, op: Op, bucket: int, context: Context) -> str | None:
    if kernel.side != op.get("side", kernel.side):
        return SIDES[op.get("side", "")]
    missing = kernel.needs - context.target.features
    if missing:
        return f"needs {', '.join(sorted(missing))}, which {context.target.name} lacks"
    if why := kernel.refuses(op, rows_in(op, bucket, context.target)):
        return why
    if kernel.fallback and kernel.name not in context.allow_fallback:
        return f"is a fallback: --allow-fallback {kernel.name} permits it"
    return None


def choose(op: Op, bucket: int, context: Context) -> Choice:
    """The first kernel of the table that takes the op. Raises UnservedError with every refusal."""
    refused: list[Refused] = []
    for kernel in context.kernels:
        if op.name not in kernel.serves:
            continue
        why = _refusal(kernel, op, bucket, context)
        if why is None:
            return Choice(op, bucket, kernel, tuple(refused))
        refused.append(Refused(kernel.name, why))
    where = op.loc or str(op.out)
    reasons = "\n".join(f"  {r.kernel}: {r.reason}" for r in refused)
    raise UnservedError(
        f"{where}: no kernel of {context.target.name} runs {op.name} with {bucket} token(s); "
        f"refused:\n{reasons or '  none serves this op'}",
        ((op, tuple(refused)),),
    )


def select(graph: Graph, context: Context) -> list[Choice]:
    """The choice of each launched op in each bucket, in launch order.

    Raises UnservedError: of all ops that have none in the smallest bucket, or of one in another.
    """
    smallest, *others = context.target.buckets
    by_bucket = {smallest: gathered(launched(graph), lambda op: choose(op, smallest, context))}
    for bucket in others:
        by_bucket[bucket] = [choose(op, bucket, context) for op in launched(graph)]
    return [choice for choices in zip(*by_bucket.values(), strict=True) for choice in choices]


def run(graph: Graph, context: Context) -> Outcome:
    log: list[LogEntry] = []
    if is_onnx(graph) and any(kernel.side for kernel in context.kernels):
        graph, log = placed(graph, context.kernels)
    by_op: dict[Op, list[Choice]] = {}
    for choice in select(graph, context):
        by_op.setdefault(choice.op, []).append(choice)
    for op, choices in by_op.items():
        at = op.loc or str(op.out)
        for c in choices:
            log.extend(
                LogEntry(r.kernel, at, False, f"bucket {c.bucket}: {r.reason}") for r in c.refused
            )
            log.append(LogEntry(c.kernel.name, at, True, f"bucket {c.bucket}"))
    ops = [_with_kernels(op, by_op[op]) if op in by_op else op for op in graph.ops]
    return Outcome(graph.with_ops(ops).with_attrs(buckets=context.target.buckets), tuple(log))


def _with_kernels(op: Op, choices: list[Choice]) -> Op:
    kernels = tuple(c.kernel.name for c in choices)
    return Op(op.name, op.args, op.outs, {**op.attrs, "kernels": kernels}, op.loc)


def ensures(graph: Graph, context: Context) -> None:
    """No op without a kernel in a bucket, no fallback that was not allowed."""
    fallbacks = {k.name for k in context.kernels if k.fallback} - context.allow_fallback
    for op in launched(graph):
        kernels = op.strs("kernels")
        if len(kernels) != len(context.target.buckets):
            raise IRError(f"35_select_kernels: {op.loc} has {len(kernels)} kernels")
        if fallbacks.intersection(kernels):
            raise IRError(f"35_select_kernels: {op.loc} runs a fallback that was not allowed")
