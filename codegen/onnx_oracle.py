"""What ONNX operators mean: onnx's reference evaluator on one op of the IR at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from ..ir.graph import Attr, Op
from ..ir.numerics import NUMPY_DTYPES, Array
from ..ir.onnx_ops import DTYPES
from ..ir.ops import lookup
from ..ir.types import Plain

OURS = ("kernels", "launch", "frees", "side")
"""Attributes that phases put on ops."""
TENSOR_ATTRIBUTES = {"onnx_constant_of_shape": "value"}
"""Operators whose last operand ONNX writes as an attribute."""
_NUMBERS = {name: number for number, name in DTYPES.items()}


def evaluate_onnx(op: Op, operands: Sequence[Array | None]) -> list[Array]:
    """The results of one op, None for an operand that is absent.

    Raises whatever the evaluator raises where these operands are not what the op takes.
    """
    attrs = {k: _attr(v) for k, v in op.attrs.items() if k not in OURS}
    tensors = list(operands)
    if (name := TENSOR_ATTRIBUTES.get(op.name)) and len(tensors) > 1:
        attrs[name] = onnx.numpy_helper.from_array(cast(Any, tensors.pop()), name)
    names = [f"i{i}" if t is not None else "" for i, t in enumerate(tensors)]
    outs = [f"o{i}" for i in range(len(op.outs))]
    node = helper.make_node(lookup(op).onnx, names, outs, **attrs)
    given = {n: t for n, t in zip(names, tensors, strict=True) if t is not None}
    inputs = [_info(n, t) for n, t in given.items()]
    results = [helper.make_tensor_value_info(n, _number(op, i), None) for i, n in enumerate(outs)]
    graph = helper.make_graph([node], "one", inputs, results)
    opsets = [helper.make_opsetid("", onnx.defs.onnx_opset_version()),
              helper.make_opsetid("ai.onnx.ml", 5)]  # fmt: skip
    if lookup(op).onnx in _ML:
        node.domain = "ai.onnx.ml"
    model = helper.make_model(graph, opset_imports=opsets)
    with np.errstate(all="ignore"):
        evaluator: Any = ReferenceEvaluator(model)
        found: list[Any] = evaluator.run(None, given)
    return [
        np.asarray(f).astype(_dtype(op, i), copy=False) if _is_plain(op, i) else np.asarray(f)
        for i, f in enumerate(found)
    ]


_ML = ("ArrayFeatureExtractor", "Binarizer", "LabelEncoder", "TreeEnsemble")


def _attr(value: Attr) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _info(name: str, tensor: Array) -> onnx.ValueInfoProto:
    number = next(n for d, n in _NUMBERS.items() if NUMPY_DTYPES[d] == tensor.dtype)
    return helper.make_tensor_value_info(name, number, tensor.shape)


def _is_plain(op: Op, i: int) -> bool:
    return isinstance(op.outs[i].type.enc, Plain)


def _dtype(op: Op, i: int) -> np.dtype[Any]:
    enc = op.outs[i].type.enc
    assert isinstance(enc, Plain)
    return NUMPY_DTYPES[enc.dtype]


def _number(op: Op, i: int) -> int:
    enc = op.outs[i].type.enc
    return _NUMBERS[enc.dtype] if isinstance(enc, Plain) else 1
