"""ONNX operators whose work is other graphs, and the operand that is left out."""

from __future__ import annotations

from .graph import Op
from .onnx_ops import NOTHING, by_evaluator, onnx
from .opdef import OpDef
from .types import TensorType

MOST = 1 << 16
"""Operands of an op that takes any number of them."""


def _as_declared(op: Op) -> tuple[TensorType, ...]:
    """The types that the importer gave the results: those of the body's."""
    return tuple(v.type for v in op.outs)


def _absent(op: Op) -> TensorType:
    return NOTHING


OPS: dict[str, OpDef] = {
    "absent": OpDef("an optional operand that is left out", 0, 0, _absent, by_evaluator),
    "onnx_if": onnx("If", "one of two graphs, by a condition; behind it what they capture", 1, MOST,
                    _as_declared, {"then": "graph", "else": "graph",
                                   "then_captures": "operands it is handed",
                                   "else_captures": "operands it is handed"}),
    "onnx_loop": onnx("Loop", "a graph again and again: trip count, condition, carried values, "
                      "captures", 2, MOST, _as_declared,
                      {"body": "graph", "carried": "values handed from turn to turn"}),
    "onnx_scan": onnx("Scan", "a graph for each slice: states, scanned inputs, captures", 1, MOST,
                      _as_declared, {"body": "graph", "states": "values handed on"}),
}  # fmt: skip
