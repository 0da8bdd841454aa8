"""Builds a graph op by op, for importers, tests and phases that start anew."""

from __future__ import annotations

from .errors import IRError
from .graph import Attr, Graph, Op, Value
from .ops import infer
from .types import TensorType


class Builder:
    """Builds a graph op by op; each result is typed by the op table as it is made.

    Names: `%hint`, then `%hint.1`, `%hint.2` … in order of creation, so equal builds print equal
    text.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.args: list[Value] = []
        self.ops: list[Op] = []
        self._count: dict[str, int] = {}
        self._weights: dict[str, Value] = {}

    def _named(self, hint: str, type: TensorType) -> Value:
        seen = self._count.get(hint, 0)
        self._count[hint] = seen + 1
        return Value(hint if not seen else f"{hint}.{seen}", type)

    def arg(self, name: str, type: TensorType) -> Value:
        value = self._named(name, type)
        self.args.append(value)
        return value

    def weight(self, source: str, type: TensorType) -> Value:
        """The tensor `source` of the checkpoint; asked for twice, it is one value."""
        if source not in self._weights:
            value = self._named("w", type)
            self.ops.append(Op("weight", (), (value,), {"source": source}))
            self._weights[source] = value
        elif self._weights[source].type != type:
            raise IRError(f"weight {source}: typed {self._weights[source].type} and {type}")
        return self._weights[source]

    def state(self, source: str, type: TensorType) -> Value:
        """Memory that outlives a step, zero at first."""
        value = self._named("s", type)
        self.ops.append(Op("state", (), (value,), {"source": source}))
        return value

    def ops_of(
        self, name: str, *args: Value, loc: str = "", hints: tuple[str, ...] = ("v",), **attrs: Attr
    ) -> tuple[Value, ...]:
        """Append an op, its results typed by inference. Raises IRError where they cannot be."""
        op = Op(name, args, (), dict(attrs), loc)
        op.outs = tuple(self._named(h, t) for h, t in zip(hints, infer(op), strict=True))
        self.ops.append(op)
        return op.outs

    def op(self, name: str, *args: Value, loc: str = "", hint: str = "v", **attrs: Attr) -> Value:
        """`ops_of` for an op with one result."""
        return self.ops_of(name, *args, loc=loc, hints=(hint,), **attrs)[0]

    def build(self, *outs: Value, **attrs: Attr) -> Graph:
        return Graph(self.name, tuple(self.args), tuple(self.ops), tuple(outs), dict(attrs))
