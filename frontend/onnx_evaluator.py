"""One node evaluated by the reference evaluator of onnx: its own meaning of its operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.reference import ReferenceEvaluator as _Evaluator

from .onnx_model import NEWEST
from .onnx_tensors import DTYPE_OF_NUMPY, ONNX_DTYPES, Constant
from .tensor_info import Array


def run_model(model: ModelProto, inputs: Mapping[str, Array]) -> Sequence[Any]:
    """All outputs. Raises whatever numpy and onnx raise."""
    evaluator = cast(Evaluator, _Evaluator(model))
    return evaluator.run(None, dict(inputs))


class Evaluator(Protocol):
    """What onnx's class does, typed."""

    def run(self, names: None, inputs: dict[str, Array]) -> Sequence[Any]: ...


def evaluate(node: NodeProto, operands: Mapping[str, Array]) -> list[Constant] | None:
    """The node's results in the newest opset. None where it fails, or makes what is no tensor.

    What fails here fails again when the graph runs, with a message of the kernel.
    """
    inputs = [_info(name, data) for name, data in operands.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None)
               for name in node.output]  # fmt: skip
    model = helper.make_model(
        helper.make_graph([node], "node", inputs, outputs),
        opset_imports=[helper.make_opsetid("", NEWEST)],
    )
    try:
        with np.errstate(all="ignore"):
            results = run_model(model, operands)
    except Exception:  # numpy's and onnx's errors of every kind
        return None
    made = [_constant(result) for result in results]
    found = [c for c in made if c is not None]
    return found if len(found) == len(made) else None


def _info(name: str, data: Array) -> ValueInfoProto:
    dtype = ONNX_DTYPES[DTYPE_OF_NUMPY[data.dtype]]
    return helper.make_tensor_value_info(name, dtype, data.shape)


def _constant(result: Any) -> Constant | None:
    """A result that is a tensor (numpy scalars included) of a type that the IR has."""
    if not isinstance(result, np.ndarray | np.generic):
        return None
    data: Array = np.asarray(cast(Any, result))
    dtype = DTYPE_OF_NUMPY.get(data.dtype)
    return None if dtype is None else Constant(dtype, data.shape, lambda: data)
