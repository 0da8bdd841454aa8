"""Types of values, by onnx's shape inference over the graph and all its bodies.

Constants ride along: their types always, their data where they are small, since shapes are made of
those. Value infos of the file are not used: they may be stale, or lie.
"""

from __future__ import annotations

import re

import onnx
from onnx import GraphProto, TensorProto, TypeProto, helper, numpy_helper

from ..ir.errors import ModelError
from ..ir.onnx_ops import DTYPES
from ..ir.types import UNKNOWN, UNRANKED, Dim, Plain, TensorType
from .onnx_model import NEWEST, Model, graphs
from .onnx_tensors import ONNX_DTYPES, Constant

SMALL = 1024
"""Elements up to which inference sees a constant's data."""
SYMBOL = re.compile(r"D\d+")
"""Symbols of an import (onnx_inputs.py); onnx makes up others (unk__0), which say nothing."""
DOMAINS = {"": NEWEST, "ai.onnx.ml": 5, "ai.onnx.preview": 1,
           "ai.onnx.preview.training": 1, "trt": 1}  # fmt: skip


def infer_types(model: Model) -> None:
    """Fill `model.types`. Raises ModelError where onnx's inference gives up altogether."""
    proto = helper.make_model(
        _with_constants(model), functions=list(model.facades.values()),
        opset_imports=[helper.make_opsetid(d, v) for d, v in DOMAINS.items()],
    )  # fmt: skip
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
    except Exception as error:  # C++ exceptions of several kinds
        raise ModelError(
            f"{model.file}: shapes cannot be inferred: {str(error)[:300]}; export the model again"
        ) from None
    model.types = {}
    for graph in graphs(inferred.graph):
        for value in (*graph.value_info, *graph.input, *graph.output):
            model.types[value.name] = value.type


def _with_constants(model: Model) -> GraphProto:
    """A copy of the graph whose bodies carry the constants that they read."""
    graph = GraphProto()
    graph.CopyFrom(model.graph)
    tensors: dict[str, TensorProto] = {}
    for body in graphs(graph):
        read = {n for node in body.node for n in node.input} | {o.name for o in body.output}
        for name in sorted(read & model.constants.keys()):
            if name not in tensors:
                tensors[name] = _tensor(name, model.constants[name])
            body.initializer.append(tensors[name])
        if body is not graph:
            _own_outputs(body)
        told = body.output if body is graph else (*body.output, *body.input)
        for value in told:  # what a body is handed may change its shape from turn to turn
            _forget_shape(value.type)
    return graph


def _own_outputs(body: GraphProto) -> None:
    """A body that returns a value of outside, untouched, has no type for it: copy it inside."""
    made = {n for node in body.node for n in node.output} | {v.name for v in body.input}
    for value in body.output:
        if value.name not in made:
            copy = f"{value.name} returned by {body.name}"
            body.node.append(helper.make_node("Identity", [value.name], [copy]))
            value.name = copy


def _forget_shape(type_: TypeProto) -> None:
    if type_.HasField("tensor_type"):
        type_.tensor_type.ClearField("shape")


def _tensor(name: str, constant: Constant) -> TensorProto:
    if constant.count <= SMALL:
        return numpy_helper.from_array(constant.load(), name)
    return TensorProto(
        name=name, data_type=ONNX_DTYPES[constant.dtype], dims=constant.shape,
        data_location=TensorProto.EXTERNAL,
    )  # fmt: skip


def tensor_type(model: Model, name: str) -> TensorType | None:
    """The type of a value; None where inference knows no element type, or it is no tensor."""
    if name in model.constants:
        return model.constants[name].type
    found = model.types.get(name)
    if found is None or not found.HasField("tensor_type"):
        return None
    dtype = DTYPES.get(found.tensor_type.elem_type)
    if dtype is None:
        return None
    if not found.tensor_type.HasField("shape"):
        return TensorType(UNRANKED, Plain(dtype))
    dims = tuple(_dim(d) for d in found.tensor_type.shape.dim)
    return TensorType(dims, Plain(dtype))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return dim.dim_value
    return dim.dim_param if SYMBOL.fullmatch(dim.dim_param) else UNKNOWN
