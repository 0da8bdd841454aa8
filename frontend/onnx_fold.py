"""What is known at compile time is computed at compile time, and bodies never taken are dropped.

Constant nodes are evaluated by onnx's reference evaluator, within bounds of bytes and time; a Shape
is a constant where the extents asked for are; an If whose condition is known is the body it takes;
an Identity is its operand. It is these, not operators, that decide whether real networks compile:
exporters write every Reshape as a computation on Shape.

Never folded: what draws random numbers, and NVFP4 weights (onnx_nvfp4.py keeps those packed).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import GraphProto, NodeProto

from ..ir.types import UNRANKED, Dim
from .onnx_evaluator import evaluate
from .onnx_infer import tensor_type
from .onnx_model import (
    LEFT_OUT,
    Model,
    attribute,
    graphs,
    integer,
    integers,
    operand,
    set_nodes,
    subgraphs,
)
from .onnx_tensors import MAX_RANK, Constant, constant_of, transpose_of
from .tensor_info import Array

Shape = tuple[Dim, ...]

SECONDS = 60.0
"""Of processor time that folding may take, in all."""
MAX_BYTES = 4 << 30
"""Of all folded constants together."""
GROWTH, SMALL_BYTES = 8, 1 << 20
"""A fold may make this many times the bytes it reads, or this much: dequantised weights, not a
scalar expanded to a gigabyte."""
MOST_PRODUCTS = 1 << 26
"""Elements read times elements made, for operators that may touch each pair of them."""

RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
                    "Multinomial", "Bernoulli", "Dropout"})  # fmt: skip
UNBOUNDED = frozenset({"Einsum"})
"""Operators whose work no size of theirs bounds: a,b,c,d,e-> multiplies five extents."""
BOUNDED = frozenset({"NonZero", "Unique", "Compress"})
"""Results of unknown extent that are no larger than a few times their operands."""
LIGHT = frozenset({
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "ConstantOfShape", "Cos",
    "CumSum", "DequantizeLinear", "Div", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten",
    "Floor", "Gather", "GatherElements", "GatherND", "Greater", "GreaterOrEqual", "IsInf", "IsNaN",
    "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mod", "Mul", "Neg", "NonZero", "Not",
    "OneHot", "Or", "Pad", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "Relu", "Reshape", "Round",
    "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Split",
    "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze",
    "Where", "Xor",
})  # fmt: skip
"""Operators whose work is about what they read and make."""


@dataclass(slots=True)
class Budget:
    """What folding may still cost in this import."""

    seconds: float = SECONDS
    bytes: int = MAX_BYTES


@dataclass(slots=True)
class Folder:
    """One round over the graph. `changed`: whether another inference may know more.

    `packed`: values of NVFP4 weights, which stay as they are; `alias`: values that are other
    values; `shapes`: extents of results of Shape, known or not.
    """

    model: Model
    budget: Budget
    packed: set[str]
    alias: dict[str, str] = field(default_factory=dict[str, str])
    shapes: dict[str, Shape] = field(default_factory=dict[str, Shape])
    changed: bool = False

    def graph(self, graph: GraphProto) -> None:
        set_nodes(graph, self._nodes(graph.node))
        for value in graph.output:
            value.name = self._now(value.name)

    def _now(self, name: str) -> str:
        return self.alias.get(name, name)

    def _nodes(self, nodes: Sequence[NodeProto]) -> list[NodeProto]:
        kept: list[NodeProto] = []
        for node in nodes:
            for i, name in enumerate(node.input):
                node.input[i] = self._now(name)
            if node.op_type == "If" and not node.domain:
                taken = self._taken(node)
                if taken is not None:
                    kept.extend(self._inlined(node, taken))
                    continue
            for body in subgraphs(node):
                self.graph(body)
            if not self._folded(node):
                kept.append(node)
        return kept

    def _taken(self, node: NodeProto) -> GraphProto | None:
        """The branch of a decided If."""
        condition = self.model.value(node.input[0])
        if condition is None or condition.size != 1:
            return None
        branch = attribute(node, "then_branch" if condition.reshape(()) else "else_branch")
        return None if branch is None else branch.g

    def _inlined(self, node: NodeProto, body: GraphProto) -> list[NodeProto]:
        self.changed = True
        kept = self._nodes(body.node)
        for outer, inner in zip(node.output, body.output, strict=False):
            self.alias[outer] = self._now(inner.name)
        return kept

    def _folded(self, node: NodeProto) -> bool:
        if node.domain:
            return False
        if self._same(node):
            self.alias[node.output[0]] = node.input[0]
            return True
        if node.op_type in ("Shape", "Size", "Gather", "Slice"):
            extents = self._extents(node)
            if extents is not None:
                return self._keep(node, [constant_of(extents)])
        found = self._flipped(node) or self._evaluated(node)
        return found is not None and self._keep(node, found)

    def _same(self, node: NodeProto) -> bool:
        """Whether the result is operand 0 itself."""
        if len(node.output) > 1 and not node.output[1].startswith(LEFT_OUT):
            return False
        if node.op_type == "Identity":
            return tensor_type(self.model, node.input[0]) is not None
        if node.op_type == "Dropout":
            training = self.model.value(operand(node, 2)) if operand(node, 2) else np.array(False)
            return training is not None and not training.any()
        if node.op_type == "Cast":
            x = tensor_type(self.model, node.input[0])
            return x is not None and x == tensor_type(self.model, node.output[0])
        return False

    def _keep(self, node: NodeProto, data: Sequence[Constant]) -> bool:
        for name, constant in zip(node.output, data, strict=False):
            self.model.constants[name] = constant
        self.changed = True
        return True

    # ---- extents that types know -----------------------------------------------------------------

    def _extents(self, node: NodeProto) -> Array | None:
        """Shape, Size, Gather and Slice of a Shape, where the extents asked for are known."""
        shape = self._shape(node)
        if shape is None:
            return None
        if node.op_type in ("Shape", "Slice"):
            self.shapes[node.output[0]] = shape
        if not all(isinstance(d, int) for d in shape):
            return None
        known = np.array(shape, np.int64)
        if node.op_type == "Size":
            return np.array(math.prod(known.tolist()), np.int64)
        if node.op_type == "Gather":
            index = self.model.value(node.input[1])
            return None if index is None else known.reshape(index.shape)
        return known

    def _shape(self, node: NodeProto) -> Shape | None:
        """The extents that a node's result is made of, in order."""
        if node.op_type in ("Shape", "Size"):
            x = tensor_type(self.model, node.input[0])
            if x is None or x.shape == UNRANKED:
                return None
            end = attribute(node, "end")
            return x.shape[slice(integer(node, "start", 0), None if end is None else end.i)]
        shape = self.shapes.get(node.input[0])
        given = [self.model.value(name) for name in node.input[1:]]
        if shape is None or any(g is None or g.size > MAX_RANK for g in given):
            return None
        numbers = [[int(i) for i in g.reshape(-1)] for g in given if g is not None]
        if node.op_type == "Gather":
            inside = all(-len(shape) <= i < len(shape) for i in numbers[0])
            return tuple(shape[i] for i in numbers[0]) if inside else None
        if any(len(n) != 1 for n in numbers) or (len(numbers) > 3 and numbers[3] == [0]):
            return None
        start, stop, _, step = (*(n[0] for n in numbers), *(0, 1)[len(numbers) - 2 :])
        return shape[slice(start, stop, step)]

    # ---- evaluation ------------------------------------------------------------------------------

    def _flipped(self, node: NodeProto) -> list[Constant] | None:
        """The transpose of a large matrix is made when it is read, if it ever is."""
        source = self.model.constants.get(operand(node, 0))
        large = source is not None and source.nbytes > SMALL_BYTES // 256
        if node.op_type != "Transpose" or source is None or not large or len(source.shape) != 2:
            return None
        if integers(node, "perm") not in (None, (1, 0)):
            return None
        made = Constant(source.dtype, source.shape[::-1], transpose_of(source))
        return [replace(made, flipped=node.input[0])]

    def _evaluated(self, node: NodeProto) -> list[Constant] | None:
        """The results of a node of constants; None where it has none, costs too much, or fails."""
        constants = [self.model.constants.get(n) for n in node.input if n]
        known = [c for c in constants if c is not None]
        if len(known) != len(constants) or not self._may_fold(node, known):
            return None
        begin = time.process_time()
        found = evaluate(node, {n: self.model.constants[n].load() for n in node.input if n})
        self.budget.seconds -= time.process_time() - begin
        if found is None:
            return None
        self.budget.bytes -= sum(c.nbytes for c in found)
        return found

    def _may_fold(self, node: NodeProto, operands: Sequence[Constant]) -> bool:
        if node.op_type in RANDOM | UNBOUNDED or any(True for _ in subgraphs(node)):
            return False
        if node.output[0] in self.packed or self.budget.seconds <= 0:
            return False
        read = sum(c.nbytes for c in operands)
        made = self._bytes_made(node, read)
        if made is None or made > max(GROWTH * read, SMALL_BYTES) or made > self.budget.bytes:
            return False
        return node.op_type in LIGHT or max(read, 1) * max(made, 1) <= MOST_PRODUCTS

    def _bytes_made(self, node: NodeProto, read: int) -> int | None:
        if node.op_type in BOUNDED:
            return 8 * read
        if node.op_type == "Range":
            return self._bytes_of_range(node)
        types = [tensor_type(self.model, name) for name in node.output]
        total = 0
        for type_ in types:
            if type_ is None or not all(isinstance(d, int) for d in type_.shape):
                return None
            total += type_.nbytes
        return total

    def _bytes_of_range(self, node: NodeProto) -> int | None:
        """Inference wants scalars; exporters also write tensors of one element."""
        given = [self.model.value(name) for name in node.input]
        if any(g is None or g.size != 1 for g in given):
            return None
        start, limit, delta = (float(g.reshape(())) for g in given if g is not None)
        if not delta or not all(map(math.isfinite, (start, limit, delta))):
            return None
        return 8 * max(0, math.ceil((limit - start) / delta))


def fold(model: Model, budget: Budget) -> bool:
    """One round. Whether the types may be known better now than before it."""
    folder = Folder(model, budget, _nvfp4_weights(model))
    folder.graph(model.graph)
    return folder.changed


def _nvfp4_weights(model: Model) -> set[str]:
    """Results of the two nodes that dequantise each NVFP4 weight: its values, its block scales."""
    found: set[str] = set()
    for graph in graphs(model.graph):
        for node in graph.node:
            data = model.constants.get(operand(node, 0))
            if node.op_type == "DequantizeLinear" and data is not None and data.dtype == "f4e2m1":
                found.update((node.output[0], operand(node, 1)))
    return found
