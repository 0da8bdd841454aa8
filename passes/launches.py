"""Which ops of a graph run in a step."""

from __future__ import annotations

from ..ir.graph import SOURCES, Graph, Op, const_values


def launched(graph: Graph) -> list[Op]:
    """The ops that run in a step: neither constant nor mere memory."""
    const = const_values(graph)
    return [op for op in graph.ops if op.name not in SOURCES and op.out not in const]
