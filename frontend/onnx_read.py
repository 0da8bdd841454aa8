"""A ModelProto becomes a Model: names resolved, functions inlined, operators newly spelled.

One walk in the order of execution. Each graph is a scope: a node that reads what no node before it
made (a cycle, a typo, wrong order) is an error here, and so is a value that is made twice. Names of
bodies that an outer scope has too are changed. onnx has an inliner of its own; this one counts what
it makes, so that functions that call each other cannot explode, and takes a function's own opset.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto

from ..ir.errors import ModelError
from .onnx_model import LEFT_OUT, NEWEST, SHOWN, Model, Patch, operand, subgraphs
from .onnx_spelling import spell
from .onnx_tensors import constant_of
from .tensor_info import Array

MAX_DEPTH = 32
MAX_NODES, MAX_INLINED = 20_000, 100
"""A model may have this many nodes once its functions are inlined, and so many for each it had."""
Opsets = Mapping[str, int]
AGAIN = "the graph is not valid ONNX; export it again"


@dataclass(frozen=True, slots=True)
class Scope:
    """What a name means here: values by name, opsets by domain, attributes of a function call."""

    values: ChainMap[str, str]
    opsets: Opsets
    attributes: Mapping[str, AttributeProto]
    depth: int = 0
    results: Mapping[str, str] | None = None

    def inner(self) -> Scope:
        return replace(self, values=self.values.new_child(), depth=self.depth + 1, results=None)


def opsets_of(proto: ModelProto | FunctionProto) -> Opsets:
    return {domain_of(o.domain): o.version for o in proto.opset_import}


def domain_of(domain: str) -> str:
    """The default domain has two spellings."""
    return "" if domain == "ai.onnx" else domain


class Reader:
    """Reads graphs and functions into a Model. Raises ModelError that names file and node."""

    def __init__(self, proto: ModelProto, model: Model) -> None:
        self.model, self._tensors, self._count = model, model.tensors, 0
        self._most = MAX_INLINED * (1 + len(proto.graph.node)) + MAX_NODES
        self._functions = {(domain_of(f.domain), f.name, f.overload): f for f in proto.functions}

    def graph(self, graph: GraphProto, scope: Scope) -> None:
        """The graph in place: its inputs, nodes and outputs under unique names."""
        if scope.depth > MAX_DEPTH:
            raise self._error(f"graphs nested more than {MAX_DEPTH} deep", AGAIN)
        if graph.sparse_initializer:
            raise self._error("sparse initialisers", "export it with dense ones")
        self._initialisers(graph, scope)
        inputs = [i for i in graph.input if i.name not in scope.values.maps[0]]
        for value in inputs:
            value.name = self._define(value.name, scope, "graph input")
        del graph.input[:]
        graph.input.extend(inputs)
        nodes = self.nodes(graph.node, scope)
        del graph.node[:]
        graph.node.extend(nodes)
        for value in graph.output:
            value.name = self._resolve(value.name, scope, "graph output")
        del graph.value_info[:]

    def _initialisers(self, graph: GraphProto, scope: Scope) -> None:
        for tensor in graph.initializer:
            name = self._define(tensor.name, scope, "initialiser")
            self.model.constants[name] = self._tensors.constant(tensor, tensor.name)
        del graph.initializer[:]

    def nodes(self, nodes: Iterable[NodeProto], scope: Scope) -> list[NodeProto]:
        """The nodes as they read in the newest opset, functions replaced by what they do."""
        made: list[NodeProto] = []
        for original in nodes:
            self._count_one(original)
            node = NodeProto()
            node.CopyFrom(original)
            node.domain = domain_of(node.domain)
            self._bind_attributes(node, scope)
            for i, name in enumerate(node.input):
                node.input[i] = self._resolve(name, scope, "node", node) if name else ""
            if node.op_type == "Constant" and not node.domain:
                self._constant(node, scope)
                continue
            function = self._functions.get((node.domain, node.op_type, node.overload))
            if function is not None:
                made.extend(self._call(node, function, scope))
                continue
            made.extend(self._spelled(node, scope))
        return made

    def _spelled(self, node: NodeProto, scope: Scope) -> list[NodeProto]:
        for attr in node.attribute:
            for body in (attr.g,) if attr.type == AttributeProto.GRAPH else attr.graphs:
                self.graph(body, scope.inner())
        for i, name in enumerate(node.output):
            node.output[i] = self._define(name, scope, "node", node) if name else ""
        while node.output and not node.output[-1]:
            del node.output[-1]
        while node.input and not node.input[-1]:
            del node.input[-1]
        for i, name in enumerate(node.output):  # left out between others: it gets a type like them
            node.output[i] = name or self.model.names.fresh(LEFT_OUT)
        if not node.output:
            return []
        patch = Patch(self.model, node, [])
        spell(node, scope.opsets, patch)
        return patch.made

    # ---- functions -------------------------------------------------------------------------------

    def _call(self, node: NodeProto, function: FunctionProto, scope: Scope) -> list[NodeProto]:
        """A call's body; what the function returns takes the names of the call's outputs."""
        inner = self._enter(node, function, scope)
        made = self.nodes(function.node, inner)
        for formal, actual in zip(function.output, node.output, strict=False):
            if actual in scope.values.maps[0]:
                raise self._at(node, f"node {actual[:SHOWN]!r} is defined twice")
            if actual:
                scope.values[actual] = self._resolve(formal, inner, "function", node)
        return made

    def body(self, node: NodeProto, function: FunctionProto) -> list[NodeProto]:
        """The body of an operator that ONNX defines by a function; makes `node`'s own outputs."""
        empty = Scope(ChainMap(), {}, {})
        results = dict(zip(function.output, node.output, strict=False))
        if any(True for _ in subgraphs(node)):  # such a body holds nodes of the operator's graph,
            known = self.model.names.taken  # which read what they read before
            empty = replace(empty, values=ChainMap({name: name for name in known}))
        inner = self._enter(node, function, empty)
        inner = replace(inner, results=results, opsets={"": NEWEST, **inner.opsets})
        made = self.nodes(function.node, inner)
        for formal, actual in results.items():
            if inner.values[formal] != actual:  # an operand or a constant is the result
                source = inner.values[formal]
                made.append(NodeProto(op_type="Identity", input=[source], output=[actual]))
        return made

    def _enter(self, node: NodeProto, function: FunctionProto, scope: Scope) -> Scope:
        if scope.depth >= MAX_DEPTH:
            what = f"functions call each other more than {MAX_DEPTH} deep"
            raise self.model.fail(node, what, "a function must not call itself")
        if len(node.input) > len(function.input) or len(node.output) > len(function.output):
            raise self.model.fail(node, "gives more operands than its function has", AGAIN)
        values = {formal: operand(node, i) for i, formal in enumerate(function.input)}
        given = {a.name: a for a in (*function.attribute_proto, *node.attribute)}
        outside = scope.values.maps if scope.depth == 0 and not scope.opsets else []
        return Scope(ChainMap(values, *outside), opsets_of(function), given, scope.depth + 1)

    def _bind_attributes(self, node: NodeProto, scope: Scope) -> None:
        """Attributes that a function hands on are those of its call, or left out."""
        kept: list[AttributeProto] = []
        for attr in node.attribute:
            if not attr.ref_attr_name:
                kept.append(attr)
            elif attr.ref_attr_name in scope.attributes:
                bound = AttributeProto()
                bound.CopyFrom(scope.attributes[attr.ref_attr_name])
                bound.name = attr.name
                kept.append(bound)
        del node.attribute[:]
        node.attribute.extend(kept)

    # ---- names and constants ---------------------------------------------------------------------

    def _define(self, name: str, scope: Scope, what: str, node: NodeProto | None = None) -> str:
        if not name or name in scope.values.maps[0]:
            raise self._at(node, f"{what} {name[:SHOWN]!r} is defined twice or has no name")
        given = (scope.results or {}).get(name)
        unique = given or self.model.names.fresh(name)
        scope.values[name] = unique
        return unique

    def _resolve(self, name: str, scope: Scope, what: str, node: NodeProto | None = None) -> str:
        found = scope.values.get(name)
        if found is None:
            raise self._at(
                node,
                f"{what} reads {name[:SHOWN]!r}, which nothing before it makes (a cycle, or nodes "
                "out of order)",
            )
        return found

    def _constant(self, node: NodeProto, scope: Scope) -> None:
        """A Constant node is a constant. Strings and sparse values are refused."""
        if len(node.output) != 1 or len(node.attribute) != 1:
            raise self.model.fail(node, "expected one output and one attribute", AGAIN)
        attr = node.attribute[0]
        name = self._define(node.output[0], scope, "node", node)
        if attr.name == "value":
            self.model.constants[name] = self._tensors.constant(attr.t, node.output[0])
            return
        plain: dict[str, Array] = {
            "value_int": np.array(attr.i, np.int64), "value_ints": np.array(attr.ints, np.int64),
            "value_float": np.array(attr.f, np.float32),
            "value_floats": np.array(attr.floats, np.float32),
        }  # fmt: skip
        if attr.name not in plain:
            raise self.model.fail(
                node,
                f"a constant by {attr.name[:SHOWN]!r}",
                "strings and sparse tensors are not compiled",
            )
        self.model.constants[name] = constant_of(plain[attr.name])

    def _count_one(self, node: NodeProto) -> None:
        self._count += 1
        if self._count > self._most:
            what = f"more than {self._most} nodes once functions are inlined"
            raise self.model.fail(node, what, "compile a smaller graph")

    def _at(self, node: NodeProto | None, what: str) -> ModelError:
        return self._error(what, AGAIN) if node is None else self.model.fail(node, what, AGAIN)

    def _error(self, what: str, do: str) -> ModelError:
        return ModelError(f"{self.model.file}: {what}; {do}")
