"""Nodes become ops: the last step of an import before patterns are looked for.

A body of control flow is a graph of its own whose arguments are the operator's own inputs, then
what it captures from outside; constants are declared inside again. Types are onnx's, completed by
the rules of the op table, and held against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from onnx import AttributeProto, GraphProto, NodeProto

from ..ir.errors import IRError, ModelError
from ..ir.graph import Attr, Graph, Op, Value
from ..ir.onnx_ops import ABSENT, NOTHING, refines
from ..ir.ops import OPS, infer
from ..ir.types import UNKNOWN, UNRANKED, Dim, TensorType, tensor
from .onnx_facades import FP4_DYNAMIC
from .onnx_infer import tensor_type
from .onnx_inputs import kind
from .onnx_match import shortest
from .onnx_model import LEFT_OUT, Model, attribute, integer, integers, label, subgraphs
from .onnx_names import OP_OF, ValueNames

FP4_DYNAMIC_OP = "trt_fp4_dynamic_quantize"
"""Stands for the node until a pattern has taken it; the op table does not know it."""
LOOP_OWN = 2
"""Inputs of a Loop that are not carried: trip count and condition."""


@dataclass(slots=True)
class _Program:
    """A graph under construction: its values by their ONNX names."""

    names: ValueNames = field(default_factory=ValueNames)
    values: dict[str, Value] = field(default_factory=dict[str, Value])
    ops: list[Op] = field(default_factory=list[Op])


class Translator:
    """Makes the graphs, main first, then bodies in the order of their nodes."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._graphs: list[Graph] = []

    def graphs(self) -> tuple[Graph, ...]:
        """Raises ModelError for a node that has no entry in the op table, or no type."""
        self._check_known()
        graph = self._model.graph
        self._translate("main", graph, [v.name for v in graph.input])
        return tuple(self._graphs)

    def _check_known(self) -> None:
        unknown: dict[str, NodeProto] = {}
        for node in _all_nodes(self._model.graph):
            if node.op_type not in OP_OF and node.domain != "trt":
                unknown.setdefault(node.op_type, node)
        if unknown:
            first = next(iter(unknown.values()))
            raise self._model.fail(
                first,
                f"{len(unknown)} operator(s) that halfbyte does not have: "
                f"{', '.join(sorted(unknown)[:12])}",
                "docs/onnx.md lists what there is; export the model with these operators",
            )

    def _translate(
        self,
        name: str,
        graph: GraphProto,
        inputs: Sequence[str],
        types: Sequence[TensorType | None] = (),
    ) -> None:
        """Append a graph and its bodies; `types` of its first inputs, where its caller knows."""
        at = len(self._graphs)
        program = _Program()
        told = [*types, *[None] * (len(inputs) - len(types))]
        args = tuple(self._argument(program, n, t) for n, t in zip(inputs, told, strict=True))
        self._graphs.append(Graph(name, args, (), ()))  # its place, before those of its bodies
        for node in needed(graph)[0]:
            self._node(program, node)
        outs = tuple(self._operand(program, v.name) for v in graph.output)
        self._graphs[at] = Graph(name, args, tuple(program.ops), outs)

    def _argument(self, program: _Program, name: str, told: TensorType | None) -> Value:
        type_ = told or tensor_type(self._model, name)
        if type_ is None:
            raise self._untyped(name)
        value = Value(program.names.fresh(name), type_)
        program.values[name] = value
        return value

    def _untyped(self, name: str) -> ModelError:
        found = self._model.types.get(name)
        what = "of unknown type" if found is None else kind(found)
        return ModelError(
            f"{self._model.file}: value {name[:80]!r} is {what}, expected a tensor of numbers; "
            "sequences, optionals and strings are not compiled"
        )

    def _operand(self, program: _Program, name: str) -> Value:
        """The value; a constant is declared where it is first read, `absent` likewise."""
        if name not in program.values:
            constant = self._model.constants.get(name)
            if not name:
                op = Op(ABSENT, (), (Value(program.names.fresh(ABSENT), NOTHING),))
            elif constant is not None:
                value = Value(program.names.fresh(name), constant.type)
                op = Op("weight", (), (value,), {"source": name})
            else:
                raise ModelError(
                    f"{self._model.file}: value {name[:80]!r} is not defined; export again"
                )
            program.ops.append(op)
            program.values[name] = op.out
        return program.values[name]

    # ---- one node --------------------------------------------------------------------------------

    def _node(self, program: _Program, node: NodeProto) -> None:
        operands = [self._operand(program, name) for name in node.input]
        self._demand(node, operands)
        attrs = self._bodies(program, node, operands)
        for attr in node.attribute:
            if attr.type == AttributeProto.TENSOR:
                operands.append(self._operand(program, self._tensor_attribute(node, attr)))
            elif attr.type != AttributeProto.GRAPH:
                attrs[attr.name] = self._attr(node, attr)
        name = FP4_DYNAMIC_OP if node.op_type == FP4_DYNAMIC else OP_OF[node.op_type]
        op = Op(name, tuple(operands), (), attrs, label(node))
        op.outs = self._results(program, node, op)
        program.ops.append(op)

    def _demand(self, node: NodeProto, operands: list[Value]) -> None:
        """A product with a matrix says the inner extent of its other side, which an exporter's
        Reshape by a computed shape did not: it is that extent, or no run gets past the node.
        """
        if node.op_type != "MatMul":
            return
        x, w = operands
        if len(w.type.shape) == 2 and x.type.shape[-1:] == (UNKNOWN,):
            x.type = x.type.with_shape(*x.type.shape[:-1], w.type.shape[0])

    def _tensor_attribute(self, node: NodeProto, attr: AttributeProto) -> str:
        """The value of ConstantOfShape and its like, as one more constant."""
        name = self._model.names.fresh(f"{node.output[0]}.{attr.name}")
        reader = self._model.tensors
        self._model.constants[name] = reader.constant(attr.t, name)
        return name

    def _attr(self, node: NodeProto, attr: AttributeProto) -> Attr:
        match attr.type:
            case AttributeProto.INT:
                return attr.i
            case AttributeProto.FLOAT:
                return shortest(attr.f)
            case AttributeProto.STRING:
                return attr.s.decode("utf-8", "replace")
            case AttributeProto.INTS:
                return tuple(attr.ints)
            case AttributeProto.FLOATS:
                return tuple(shortest(f) for f in attr.floats)
            case AttributeProto.STRINGS:
                return tuple(s.decode("utf-8", "replace") for s in attr.strings)
            case _:
                what = f"attribute {attr.name} of type {attr.type}, expected numbers or text"
                raise self._model.fail(node, what, "export it otherwise")

    def _results(self, program: _Program, node: NodeProto, op: Op) -> tuple[Value, ...]:
        known = [tensor_type(self._model, name) for name in node.output]
        ours: Sequence[TensorType | None] = self._inferred(node, op)
        outs: list[Value] = []
        for i, (name, type_) in enumerate(zip(node.output, known, strict=True)):
            rule = ours[i] if i < len(ours) else None
            joint = type_ or rule
            if joint is None and name.startswith(LEFT_OUT) and op.args:
                joint = op.args[0].type.with_shape(*UNRANKED)  # nobody asks
            if joint is None:
                raise self._untyped(name)
            if rule is not None and not refines(joint, rule):
                raise self._model.fail(
                    node, f"result {name[:80]!r} is {joint} by onnx's shape inference and {rule} "
                    "by ours", "export the model again"
                )  # fmt: skip
            value = Value(program.names.fresh(name), _joined(joint, rule))
            program.values[name] = value
            outs.append(value)
        return tuple(outs)

    def _inferred(self, node: NodeProto, op: Op) -> Sequence[TensorType | None]:
        if op.name not in OPS:
            return ()
        try:
            return infer(op)
        except IRError as error:
            raise self._model.fail(node, str(error), "export the model again") from None

    # ---- control flow ----------------------------------------------------------------------------

    def _bodies(self, program: _Program, node: NodeProto, operands: list[Value]) -> dict[str, Attr]:
        """Attributes that name the node's bodies; what these capture joins the operands."""
        if not any(True for _ in subgraphs(node)):
            return {}
        match node.op_type:
            case "If":
                return self._if(program, node, operands)
            case "Loop":
                return self._loop(program, node, operands)
            case "Scan":
                attrs = self._scan(node)
                types = [_of_any_shape(v) for v in operands]
                return attrs | self._turning(program, node, operands, types, len(node.output))
            case _:
                raise self._model.fail(node, "takes a graph", "only If, Loop and Scan may")

    def _loop(self, program: _Program, node: NodeProto, operands: list[Value]) -> dict[str, Attr]:
        while len(operands) < LOOP_OWN:
            operands.append(self._operand(program, ""))
        types = [tensor("i64"), tensor("bool"), *map(_of_any_shape, operands[LOOP_OWN:])]
        attrs: dict[str, Attr] = {"carried": len(operands) - LOOP_OWN}
        return attrs | self._turning(program, node, operands, types, 1 + len(node.output))

    def _turning(
        self,
        program: _Program,
        node: NodeProto,
        operands: list[Value],
        types: Sequence[TensorType],
        gives: int,
    ) -> dict[str, Attr]:
        """The body of a Loop or Scan, which takes as much as the operator, and gives `gives`."""
        body = attribute(node, "body")
        assert body is not None
        self._check_arity(node, body.g, len(operands), gives)
        captured = self._captured(body.g)
        operands.extend(self._operand(program, n) for n in captured)
        name = self._body_name("body")
        self._translate(name, body.g, [*(v.name for v in body.g.input), *captured], types)
        return {"body": name}

    def _captured(self, body: GraphProto) -> list[str]:
        """What a body reads from outside, but constants."""
        return [n for n in needed(body)[1] if n not in self._model.constants]

    def _check_arity(self, node: NodeProto, body: GraphProto, takes: int, gives: int) -> None:
        found = len(body.input), len(body.output)
        if found[0] != takes or found[1] < gives:
            what = f"its body takes {found[0]} and gives {found[1]}, expected {takes} and {gives}"
            raise self._model.fail(node, what, "export the model again")

    def _body_name(self, what: str) -> str:
        return f"{what}_{len(self._graphs)}"

    def _if(self, program: _Program, node: NodeProto, operands: list[Value]) -> dict[str, Attr]:
        attrs: dict[str, Attr] = {}
        place: dict[str, int] = {}
        for branch in ("then", "else"):
            body = attribute(node, f"{branch}_branch")
            assert body is not None
            self._check_arity(node, body.g, 0, len(node.output))
            captured = self._captured(body.g)
            for name in captured:
                if name not in place:
                    place[name] = len(operands)
                    operands.append(self._operand(program, name))
            attrs[branch] = name = self._body_name(branch)
            attrs[f"{branch}_captures"] = tuple(place[n] for n in captured)
            self._translate(name, body.g, captured)
        return attrs

    def _scan(self, node: NodeProto) -> dict[str, Attr]:
        """All lists written out: axis 0, forward, where the file leaves them to default."""
        body = attribute(node, "body")
        assert body is not None
        inputs = integer(node, "num_scan_inputs", 0)
        states = len(node.input) - inputs
        made = len(body.g.output) - states
        if states < 0 or made < 0 or inputs < 1:
            raise self._model.fail(node, f"num_scan_inputs is {inputs}", "export it again")
        attrs: dict[str, Attr] = {"states": states}
        for name, count in (("scan_input", inputs), ("scan_output", made)):
            for what in ("axes", "directions"):
                attrs[f"{name}_{what}"] = integers(node, f"{name}_{what}") or (0,) * count
        return attrs


def _of_any_shape(value: Value) -> TensorType:
    """What a body is handed in some turn: of the dtype of the first, of any shape."""
    return value.type.with_shape(*UNRANKED)


def _joined(found: TensorType, rule: TensorType | None) -> TensorType:
    """What either knows."""
    if rule is None or rule.shape == UNRANKED:
        return found
    if found.shape == UNRANKED:
        return rule
    dims: list[Dim] = []
    for a, b in zip(found.shape, rule.shape, strict=True):
        dims.append(b if isinstance(b, int) or a == UNKNOWN else a)
    return found.with_shape(*dims)


def _all_nodes(graph: GraphProto) -> list[NodeProto]:
    nodes: list[NodeProto] = []
    for node in needed(graph)[0]:
        nodes.append(node)
        for body in subgraphs(node):
            nodes.extend(_all_nodes(body))
    return nodes


def needed(graph: GraphProto) -> tuple[list[NodeProto], list[str]]:
    """The nodes that the outputs need, and the names these read from outside, in order."""
    live = {v.name for v in graph.output}
    kept: list[tuple[NodeProto, list[str]]] = []
    for node in reversed(graph.node):
        if live.isdisjoint(node.output):
            continue
        read = [*node.input, *(n for body in subgraphs(node) for n in needed(body)[1])]
        live.update(read)
        kept.append((node, read))
    inside = {v.name for v in graph.input}
    outside: dict[str, None] = {}
    for node, read in reversed(kept):
        outside.update((n, None) for n in read if n and n not in inside)
        inside.update(node.output)
    outside.update((v.name, None) for v in graph.output if v.name not in inside)
    return [node for node, _ in reversed(kept)], list(outside)
