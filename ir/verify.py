"""Is the graph well formed? Names, order, operands and types of every op, by the op table."""

from __future__ import annotations

from .errors import IRError
from .graph import SOURCES, Graph, Op, Value
from .onnx_ops import refines
from .ops import infer, lookup
from .text import excerpt
from .types import TensorType


def _complaint(op: Op, seen: set[Value]) -> str | None:
    for v in op.args:
        if v not in seen:
            return f"{v} is used before it is defined"
    if op.name in SOURCES:
        lookup(op)
        return None
    types = infer(op)
    if not _agree(op, types):
        found = ", ".join(str(v.type) for v in op.outs)
        return f"typed {found}, expected {', '.join(map(str, types))}"
    return None


def _agree(op: Op, types: tuple[TensorType, ...]) -> bool:
    """Equal; for an ONNX operator, none of fewer results less than its rule knows."""
    found = tuple(v.type for v in op.outs)
    if not lookup(op).onnx:
        return found == types
    return len(found) <= len(types) and all(map(refines, found, types))


def verify(graph: Graph) -> None:
    """Raises IRError that underlines each wrong op (as a note)."""
    seen: set[Value] = set(graph.args)
    names = [v.name for v in graph.values()]
    marks: dict[int, str] = {}
    for i, op in enumerate(graph.ops):
        try:
            why = _complaint(op, seen)
        except IRError as error:
            why = str(error)
        if why:
            marks[i] = why
        seen.update(op.outs)
    if marks:
        first = marks[min(marks)]
        error = IRError(f"@{graph.name}: {len(marks)} op(s) do not verify: {first}")
        error.add_note(excerpt(graph, marks))
        raise error
    if len(names) != len(set(names)):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise IRError(f"@{graph.name}: defined twice: {', '.join(twice[:5])}")
    for v in graph.outs:
        if v not in seen:
            raise IRError(f"@{graph.name}: returns {v}, which is not defined")
