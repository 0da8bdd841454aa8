"""How long the values of an ONNX graph live: behind which op nobody reads them any more."""

from __future__ import annotations

from ..ir.errors import IRError
from ..ir.graph import Graph, Op, Value, const_values
from .launches import launched

KIND = "onnx"


def is_onnx(graph: Graph) -> bool:
    """Whether the graph came of an ONNX file: shapes may be known only to a run."""
    return graph.attrs.get("kind") == KIND


def frees(graph: Graph) -> dict[Op, tuple[str, ...]]:
    """The names of the values that end with each op: arguments too, constants and results never."""
    const, kept = const_values(graph), set(graph.outs)
    ends: dict[Value, Op] = {}
    for op in launched(graph):
        for v in (*op.args, *op.outs):
            if v not in const and v not in kept:
                ends[v] = op
    absent = {v for op in graph.ops if op.name == "absent" for v in op.outs}
    found: dict[Op, tuple[str, ...]] = {}
    for v, op in ends.items():
        if v not in absent:
            found[op] = (*found.get(op, ()), v.name)
    return found


def check_frees(graph: Graph) -> None:
    """By brute force: no op reads what an op before it has ended. Raises IRError."""
    gone: set[str] = set()
    for op in launched(graph):
        for v in op.args:
            if v.name in gone:
                raise IRError(f"40_memory_plan: {op.loc or op.out} reads {v}, which has ended")
        gone.update(op.strs("frees"))
    for v in graph.outs:
        if v.name in gone:
            raise IRError(f"40_memory_plan: the result {v} has ended")
