"""An ONNX model under import: one graph of nodes, every name of a value unique in all of it.

Initialisers and Constant nodes are out of the graphs, in `constants`; functions are inlined; every
operator is in the spelling of the newest opset. That makes each later step a walk over nodes that
can move any of them into any graph that sees its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TypeProto, defs, helper

from ..ir.errors import ModelError
from ..ir.rewrite import LogEntry
from .onnx_tensors import Constant, TensorReader, constant_of
from .tensor_info import Array

NEWEST: int = defs.onnx_opset_version()
"""The opset that everything is brought to: the newest of the installed onnx package."""
SHOWN = 80
LEFT_OUT = "(left out)"
"""How the names begin that results get which a node has between others and nobody asked for."""

AttrValue = int | float | str | Sequence[int] | Sequence[float] | Sequence[str]


@dataclass(slots=True)
class Names:
    """Unique names of values: a name is kept where nobody has it yet, numbered otherwise."""

    taken: set[str] = field(default_factory=set[str])
    count: dict[str, int] = field(default_factory=dict[str, int])

    def fresh(self, hint: str) -> str:
        name = hint
        while not name or name in self.taken:
            self.count[hint] = self.count.get(hint, 0) + 1
            name = f"{hint}.{self.count[hint]}"
        self.taken.add(name)
        return name


@dataclass(slots=True)
class Model:
    """What the steps of an import hand on. `types`: of values, by onnx's shape inference.

    `facades` are functions that stand for operators of ours that onnx does not know, so that its
    inference sees through them (onnx_facades.py).
    """

    file: Path
    graph: GraphProto
    constants: dict[str, Constant]
    names: Names
    tensors: TensorReader
    types: dict[str, TypeProto] = field(default_factory=dict[str, TypeProto])
    facades: dict[str, FunctionProto] = field(default_factory=dict[str, FunctionProto])
    log: list[LogEntry] = field(default_factory=list[LogEntry])
    notes: list[str] = field(default_factory=list[str])

    def fail(self, node: NodeProto, what: str, do: str) -> ModelError:
        return node_error(self.file, node, what, do)

    def fail_at(self, loc: str, operator: str, what: str, do: str) -> ModelError:
        """`fail` for an op that is no node any more."""
        return ModelError(f"{self.file}: node {loc!r} ({operator}): {what}; {do}")

    def constant(self, hint: str, data: Array) -> str:
        """A new constant; its name."""
        name = self.names.fresh(hint)
        self.constants[name] = constant_of(data)
        return name

    def value(self, name: str) -> Array | None:
        """The data of a constant, None for what is none."""
        found = self.constants.get(name)
        return None if found is None else found.load()


def operator(node: NodeProto) -> str:
    """`MatMul`, or `com.microsoft.FastGelu`."""
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def label(node: NodeProto) -> str:
    """The node's name for messages and logs: its own, or that of its first output."""
    name = node.name or next(filter(None, node.output), "")
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= SHOWN else shown[:SHOWN] + "…"


def node_error(file: Path, node: NodeProto, what: str, do: str) -> ModelError:
    """The one form of an error at a node: `file: node 'name' (operator): what is wrong; to do`."""
    return ModelError(f"{file}: node {label(node)!r} ({operator(node)[:SHOWN]}): {what}; {do}")


def attribute(node: NodeProto, name: str) -> AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def integer(node: NodeProto, name: str, otherwise: int) -> int:
    found = attribute(node, name)
    return otherwise if found is None else found.i


def real(node: NodeProto, name: str, otherwise: float) -> float:
    found = attribute(node, name)
    return otherwise if found is None else found.f


def text(node: NodeProto, name: str, otherwise: str) -> str:
    found = attribute(node, name)
    return otherwise if found is None else found.s.decode("utf-8", "replace")


def integers(node: NodeProto, name: str) -> tuple[int, ...] | None:
    found = attribute(node, name)
    return None if found is None else tuple(found.ints)


def operand(node: NodeProto, i: int) -> str:
    """The name of input i, "" where it is left out."""
    return node.input[i] if i < len(node.input) else ""


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attr in node.attribute:
        if attr.type == AttributeProto.GRAPH:
            yield attr.g
        yield from attr.graphs


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all bodies in it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def set_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


@dataclass(frozen=True, slots=True)
class Patch:
    """Writes the nodes that replace one node, and names what they make."""

    model: Model
    node: NodeProto
    made: list[NodeProto]

    def op(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str] = (),
        **attrs: AttrValue,
    ) -> str:
        """Append a node; its first output. One output with a fresh name unless they are given."""
        outs = list(outputs) or [self.model.names.fresh(f"{self.node.output[0]}.{op_type}")]
        made = NodeProto(op_type=op_type, input=inputs, output=outs, name=self.node.name)
        made.attribute.extend(helper.make_attribute(k, v) for k, v in attrs.items())
        self.made.append(made)
        return outs[0]

    def keep(self, node: NodeProto) -> None:
        self.made.append(node)

    def constant(self, data: Array) -> str:
        return self.model.constant(f"{self.node.output[0]}.c", data)

    def ints(self, values: Sequence[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def like(self, value: float, of: str) -> str:
        """A scalar of the dtype that `of` has."""
        scalar = self.constant(np.array(value, np.float32))
        return self.op("CastLike", [scalar, of])

    def fail(self, what: str, do: str = "export the model with a newer opset") -> ModelError:
        return self.model.fail(self.node, what, do)


Spelling = Callable[[NodeProto, int, Patch], None]
"""Writes a node of opset `int` as nodes of the newest one."""
