"""50: the launch list: in what order a step runs, and what may be captured as one graph.

On a target that captures graphs only capturable launches may stand in the list; the cpu walks it.
"""

from __future__ import annotations

from ..ir.errors import IRError
from ..ir.graph import Graph, Op
from ..ir.rewrite import LogEntry
from .context import Context, Outcome
from .launches import launched


def run(graph: Graph, context: Context) -> Outcome:
    order = {op: i for i, op in enumerate(launched(graph))}
    ops = [
        Op(op.name, op.args, op.outs, {**op.attrs, "launch": order[op]}, op.loc)
        if op in order
        else op
        for op in graph.ops
    ]
    how = "one captured graph" if context.target.graph_capture else "one native walk"
    detail = f"{len(order)} launches per step, {how} per bucket {list(context.target.buckets)}"
    return Outcome(graph.with_ops(ops), (LogEntry("launch list", "", True, detail),))


def ensures(graph: Graph, context: Context) -> None:
    """Launch numbers are 0, 1, 2 … in order, and every launch has its kernels."""
    for i, op in enumerate(launched(graph)):
        if op.get("launch", -1) != i or not op.strs("kernels"):
            raise IRError(f"50_capture: {op.loc or op.out} is not launch {i}")
