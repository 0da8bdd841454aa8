"""Operators that ONNX defines by a function, and that the op table has no entry for, as that
function: how the long tail of operators is there at all.
"""

from __future__ import annotations

from onnx import FunctionProto, GraphProto, NodeProto, TypeProto

from .onnx_model import Model, set_nodes, subgraphs
from .onnx_names import OP_OF
from .onnx_read import Reader
from .onnx_schemas import function_of, schema_of
from .onnx_tensors import ONNX_DTYPES


def inline_bodies(model: Model, reader: Reader) -> bool:
    """Put the body of every such node in its place, bodies of control flow included. Whether any
    was there: a body may call for more, once its types are known.
    """
    return _graph(model, reader, model.graph)


def _graph(model: Model, reader: Reader, graph: GraphProto) -> bool:
    nodes: list[NodeProto] = []
    found = False
    for node in graph.node:
        for body in subgraphs(node):
            found |= _graph(model, reader, body)
        function = None if node.op_type in OP_OF else _function(model, node)
        if function is None:
            nodes.append(node)
        else:
            found = True
            nodes.extend(reader.body(_with_defaults(node), function))
    if found:
        set_nodes(graph, nodes)
    return found


def _function(model: Model, node: NodeProto) -> FunctionProto | None:
    schema = schema_of(node.op_type, node.domain)
    if schema is None:
        return None
    try:
        return function_of(schema, node, [_type(model, name) for name in node.input])
    except Exception as error:  # C++ exceptions of several kinds
        raise model.fail(node, f"no body: {str(error)[:200]}", "export it again") from None


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
