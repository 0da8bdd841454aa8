"""What extents a value of an ONNX graph has, in terms of others: two that a run alone knows can be
proven to be the same.

A type says `?` wherever shape inference lost track. Here an extent is a number, a symbol of the
graph's inputs, or an axis of an earlier value; it is followed through operators that keep or move
axes, and through the shape arithmetic that exporters write around a Reshape.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..ir.graph import Graph, Op, Value
from ..ir.types import UNKNOWN, UNRANKED, Plain
from .context import Context

Extent = int | str | tuple[Value, int]
"""A number, a symbol, or an axis of a value."""
Extents = tuple[Extent, ...]

_KEEP = frozenset(
    f"onnx_{name}"
    for name in (
        "abs", "cast", "clip", "erf", "exp", "gelu", "identity", "layer_normalization",
        "leaky_relu", "log", "neg", "relu", "rms_normalization", "sigmoid", "softmax", "sqrt",
        "swish", "tanh",
    )
)  # fmt: skip
"""Operators whose first result has the shape of their first operand."""
_BROADCAST = frozenset(f"onnx_{name}" for name in ("add", "sub", "mul", "div", "pow", "max", "min"))
_MOST_ELEMENTS = 16  # of a vector that is followed: more are no shape


class ExtentTable:
    """The extents of the values of one graph, and of what rules put in behind it."""

    def __init__(self, graph: Graph, context: Context) -> None:
        self._graph, self._context = graph, context
        self._producers = graph.producers()
        self._extents: dict[Value, Extents | None] = {}
        self._elements: dict[Value, Extents | None] = {}
        for op in graph.ops:  # in order, so that no look-up goes deep
            for v in op.outs:
                self.of(v)
                self.elements(v)

    def of(self, v: Value) -> Extents | None:
        """One extent for each axis; None where the rank is not known."""
        if v not in self._extents:
            self._extents[v] = self._of(v)
        return self._extents[v]

    def same(self, a: Value, b: Value) -> bool:
        """Whether both are proven to have one shape."""
        found = self.of(a)
        return found is not None and found == self.of(b)

    def elements(self, v: Value) -> Extents | None:
        """The elements of a short vector or scalar of i64, each a number or an extent."""
        if v not in self._elements:
            self._elements[v] = self._elements_of(v)
        return self._elements[v]

    # --- extents ----------------------------------------------------------------------------------

    def _of(self, v: Value) -> Extents | None:
        if v.type.shape == UNRANKED:
            return None
        own: Extents = tuple((v, i) if d == UNKNOWN else d for i, d in enumerate(v.type.shape))
        op = self._producers.get(v)
        found = None if op is None or op.out is not v else self._made(op)
        if found is None or len(found) != len(own):
            return own
        return tuple(b if isinstance(a, tuple) else a for a, b in zip(own, found, strict=True))

    def _made(self, op: Op) -> Extents | None:
        """What an operator makes of its operands' extents, where it is one of those followed."""
        first = self.of(op.args[0]) if op.args else None
        if first is None:
            return None
        if op.name in _KEEP:
            return first
        if op.name in ("linear", "fused_linear"):
            return (*first[:-1], op.out.type.last)
        if op.name in _BROADCAST:
            return self._broadcast(op.out, [self.of(v) for v in op.args])
        if op.name == "onnx_transpose":
            return tuple(first[i] for i in op.ints("perm") or reversed(range(len(first))))
        if op.name == "onnx_attention":
            return self._attention(op, first)
        if op.name == "onnx_reshape":
            target = self.elements(op.args[1])
            return None if target is None else _reshaped(op, first, target)
        return None

    @staticmethod
    def _broadcast(out: Value, operands: Sequence[Extents | None]) -> Extents | None:
        known = [extents for extents in operands if extents is not None]
        if len(known) != len(operands):
            return None
        rank = max(map(len, known))
        axes = zip(*((1,) * (rank - len(e)) + e for e in known), strict=True)
        joint = [{extent for extent in axis if extent != 1} for axis in axes]
        return tuple(
            1 if not found else found.pop() if len(found) == 1 else (out, i)
            for i, found in enumerate(joint)
        )

    def _attention(self, op: Op, q: Extents) -> Extents | None:
        if len(q) == 3:
            return (q[0], q[1], op.out.type.shape[-1])
        v = self.of(op.args[2])
        return None if v is None or len(v) != 4 else (*q[:3], v[3])

    # --- elements ---------------------------------------------------------------------------------

    def _elements_of(self, v: Value) -> Extents | None:
        if v.type.enc != Plain("i64") or v.type.shape == UNRANKED or len(v.type.shape) > 1:
            return None
        op = self._producers.get(v)
        if op is None:
            return None
        if op.name == "weight":
            return self._stored(v)
        if op.name == "onnx_shape":
            found = self.of(op.args[0])
            end = op.get("end", 1 << 31)
            return None if found is None else found[slice(op.get("start", 0), end)]
        if op.name == "onnx_concat":
            parts = [self.elements(arg) for arg in op.args]
            known = [part for part in parts if part is not None]
            return tuple(e for part in known for e in part) if len(known) == len(parts) else None
        found = self.elements(op.args[0]) if op.args else None
        if found is None:
            return None
        if op.name in ("onnx_unsqueeze", "onnx_squeeze", "onnx_identity", "onnx_reshape"):
            return found
        if op.name == "onnx_slice":
            return self._sliced(op, found)
        if op.name == "onnx_gather":
            at = self._integers(op.args[1])
            inside = at is not None and all(-len(found) <= i < len(found) for i in at)
            return tuple(found[i] for i in at) if at is not None and inside else None
        return None

    def _stored(self, v: Value) -> Extents | None:
        if math.prod(v.type.static) > _MOST_ELEMENTS:
            return None
        data = np.asarray(self._context.constant(self._graph, v)).reshape(-1)
        return tuple(int(x) for x in data)

    def _integers(self, v: Value) -> tuple[int, ...] | None:
        found = self.elements(v)
        numbers = tuple(e for e in found or () if isinstance(e, int))
        return numbers if found is not None and len(numbers) == len(found) else None

    def _sliced(self, op: Op, found: Extents) -> Extents | None:
        bounds = [self._integers(arg) for arg in (*op.args[1:3], *op.args[4:5])]
        if any(b is None or len(b) != 1 for b in bounds):
            return None
        start, end, *step = (b[0] for b in bounds if b is not None)
        return found[slice(start, end)] if step in ([], [1]) else None


def _reshaped(op: Op, source: Extents, target: Extents) -> Extents | None:
    """The extents of a Reshape. Its -1 is known where the others leave one extent over."""
    if op.get("allowzero", 0):
        return None
    found: list[Extent] = []
    for i, extent in enumerate(target):
        if extent == 0 and i >= len(source):
            return None
        found.append(source[i] if extent == 0 else extent)
    if found.count(-1) == 1:
        at = found.index(-1)
        rest = quotient(source, [e for e in found if e != -1])
        found[at] = (op.out, at) if rest is None else rest
    return tuple(found)


def quotient(all_of: Sequence[Extent], by: Sequence[Extent]) -> Extent | None:
    """The one extent by which `by` must be multiplied to count as many elements as `all_of`."""
    left = Counter(e for e in all_of if not isinstance(e, int))
    left.subtract(e for e in by if not isinstance(e, int))
    above = math.prod(e for e in all_of if isinstance(e, int))
    below = math.prod(e for e in by if isinstance(e, int))
    symbols = [e for e, count in left.items() for _ in range(count)]
    if min(left.values(), default=0) < 0 or below <= 0 or above % below:
        return None
    factor = above // below
    if not symbols:
        return factor
    return symbols[0] if len(symbols) == 1 and factor == 1 else None
