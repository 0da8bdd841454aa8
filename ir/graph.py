"""The graph: values, ops in order, and a builder. The only mutable things of the IR.

Values and ops compare by identity; types by value. Passes are functional: they build a new graph
with `with_ops` or a Builder and never mutate the ops of the one they were given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from .errors import IRError
from .types import TensorType

Attr = bool | int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]
A = TypeVar("A", bool, int, float, str)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value lives at run time (phase 40).

    In `arena`, `offset` and `nbytes` count bytes per token: a bucket of B tokens puts the value at
    `offset * B`. In `state` and `weights` they are plain bytes. `out` is the caller's buffer.
    """

    space: str
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return f"@{self.space}[{self.offset:#x}:{self.offset + self.nbytes:#x}]"


@dataclass(eq=False, slots=True)
class Value:
    """One SSA value. `name` is unique in its graph and prints as `%name`."""

    name: str
    type: TensorType
    place: Place | None = None

    def __str__(self) -> str:
        return f"%{self.name}"


def no_attrs() -> dict[str, Attr]:
    return {}


@dataclass(eq=False, slots=True)
class Op:
    """One operation: the op table (`ops.OPS`) gives its name a meaning.

    `loc` is the module of the model it comes from; a fused op carries all of them, joined by " + ".
    """

    name: str
    args: tuple[Value, ...]
    outs: tuple[Value, ...]
    attrs: dict[str, Attr] = field(default_factory=no_attrs)
    loc: str = ""

    @property
    def out(self) -> Value:
        return self.outs[0]

    def get(self, key: str, default: A) -> A:
        """The attribute as the type of `default`. Raises IRError on another type."""
        value = self.attrs.get(key, default)
        kind = type(default)
        if kind is float and type(value) is int:
            return kind(value)
        if not isinstance(value, kind) or type(value) is not kind:
            raise IRError(f"{self.name}: attribute {key} is {value!r}, expected {kind.__name__}")
        return value

    def ints(self, key: str) -> tuple[int, ...]:
        value = self.attrs.get(key, ())
        if not isinstance(value, tuple) or not all(isinstance(v, int) for v in value):
            raise IRError(f"{self.name}: attribute {key} is {value!r}, expected integers")
        return tuple(v for v in value if isinstance(v, int))

    def floats(self, key: str) -> tuple[float, ...]:
        value = self.attrs.get(key, ())
        if not isinstance(value, tuple) or not all(isinstance(v, int | float) for v in value):
            raise IRError(f"{self.name}: attribute {key} is {value!r}, expected numbers")
        return tuple(float(v) for v in value)

    def strs(self, key: str) -> tuple[str, ...]:
        value = self.attrs.get(key, ())
        if not isinstance(value, tuple) or not all(isinstance(v, str) for v in value):
            raise IRError(f"{self.name}: attribute {key} is {value!r}, expected strings")
        return tuple(v for v in value if isinstance(v, str))


SOURCES = ("weight", "state", "absent")
"""Ops without operands: a checkpoint tensor; memory that outlives a step (the KV cache); an operand
that is left out.
"""
ONNX = "onnx_"
"""What the names of ONNX operators begin with."""


@dataclass(eq=False, slots=True)
class Graph:
    """A straight line of ops in execution order, each value defined before it is used."""

    name: str
    args: tuple[Value, ...]
    ops: tuple[Op, ...]
    outs: tuple[Value, ...]
    attrs: dict[str, Attr] = field(default_factory=no_attrs)

    def producers(self) -> dict[Value, Op]:
        return {v: op for op in self.ops for v in op.outs}

    def uses(self) -> dict[Value, list[Op]]:
        """The ops that read each value, in order (twice where an op reads it twice)."""
        found: dict[Value, list[Op]] = {}
        for op in self.ops:
            for v in op.args:
                found.setdefault(v, []).append(op)
        return found

    def values(self) -> Iterator[Value]:
        yield from self.args
        for op in self.ops:
            yield from op.outs

    def with_ops(self, ops: Sequence[Op], outs: Sequence[Value] | None = None) -> Graph:
        return replace(self, ops=tuple(ops), outs=self.outs if outs is None else tuple(outs))

    def with_attrs(self, **attrs: Attr) -> Graph:
        return replace(self, attrs={**self.attrs, **attrs})


def const_values(graph: Graph) -> set[Value]:
    """Values that depend on weights alone, so that the artifact can hold them ready-made.

    Not what an ONNX operator makes of weights: what the importer did not fold is left to a run.
    """
    const: set[Value] = set()
    for op in graph.ops:
        made = op.args and not op.name.startswith(ONNX) and all(v in const for v in op.args)
        if op.name == "weight" or made:
            const.update(op.outs)
    return const


def substitute(op: Op, by: Mapping[Value, Value]) -> Op:
    """`op` reading `by[v]` wherever it read `v`; the same object where nothing changes."""
    if not any(v in by for v in op.args):
        return op
    return replace(op, args=tuple(by.get(v, v) for v in op.args))
