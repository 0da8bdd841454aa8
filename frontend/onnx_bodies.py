"""Operators that ONNX defines by a function, as that function, where the op table has no entry for
them or no kernel takes their types: how the long tail of operators is there at all.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx import FunctionProto, GraphProto, NodeProto, TypeProto

from ..ir.graph import Op, Value
from ..ir.onnx_ops import NOTHING
from .onnx_infer import tensor_type
from .onnx_model import Model, set_nodes, subgraphs
from .onnx_names import OP_OF
from .onnx_read import Reader
from .onnx_schemas import function_of, is_sound, schema_of
from .onnx_tensors import ONNX_DTYPES

Serves = Callable[[Op], bool]
"""Whether there is a kernel for an op of these operand types; attributes are not looked at."""


def inline_bodies(model: Model, reader: Reader, serves: Serves) -> bool:
    """Put the body of every such node in its place, bodies of control flow included. Whether any
    was there: a body may call for more, once its types are known.
    """
    return _graph(model, reader, model.graph, serves)


def _graph(model: Model, reader: Reader, graph: GraphProto, serves: Serves) -> bool:
    nodes: list[NodeProto] = []
    found = False
    for node in graph.node:
        for body in subgraphs(node):
            found |= _graph(model, reader, body, serves)
        function = None if _is_served(model, node, serves) else _function(model, node)
        if function is None:
            nodes.append(node)
        else:
            found = True
            nodes.extend(reader.body(_with_defaults(node), function))
    if found:
        set_nodes(graph, nodes)
    return found


def _is_served(model: Model, node: NodeProto, serves: Serves) -> bool:
    """Whether the node can stay, as far as its types are known by now."""
    if node.op_type not in OP_OF:
        return False
    operands = [tensor_type(model, name) if name else NOTHING for name in node.input]
    results = [tensor_type(model, name) for name in node.output if name]
    args, outs = ([Value("", t) for t in types if t is not None] for types in (operands, results))
    if len(args) < len(operands) or len(outs) < len(results):
        return True
    return serves(Op(OP_OF[node.op_type], tuple(args), tuple(outs)))


def _function(model: Model, node: NodeProto) -> FunctionProto | None:
    schema = schema_of(node.op_type, node.domain)
    if schema is None:
        return None
    types = [_type(model, name) for name in node.input]
    try:
        function = function_of(schema, node, types)
    except Exception as error:  # C++ exceptions of several kinds
        raise model.fail(node, f"no body: {str(error)[:200]}", "export it again") from None
    if function is not None and node.op_type in OP_OF and not is_sound(function, node, types):
        return None  # then the kernels say what they take
    return function


def _with_defaults(node: NodeProto) -> NodeProto:
    """The node with every attribute that its schema has a value for: its body refers to them."""
    schema = schema_of(node.op_type, node.domain)
    full = NodeProto()
    full.CopyFrom(node)
    if schema is None:
        return full
    given = {a.name for a in node.attribute}
    full.attribute.extend(
        a.default_value
        for name, a in schema.attributes.items()
        if name not in given and a.default_value.name
    )
    return full


def _type(model: Model, name: str) -> TypeProto | None:
    if not name:
        return TypeProto()
    if name in model.constants:
        found = TypeProto()
        found.tensor_type.elem_type = ONNX_DTYPES[model.constants[name].dtype]
        for extent in model.constants[name].shape:
            found.tensor_type.shape.dim.add().dim_value = extent
        return found
    return model.types.get(name)
