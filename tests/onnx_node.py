"""A graph of one node, compiled and run: for operators that onnx's reference cannot check."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

import halfbyte

Operands = Sequence[np.ndarray[Any, Any] | None]


def run_node(
    folder: Path,
    operator: str,
    operands: Operands,
    results: Sequence[int] = (onnx.TensorProto.FLOAT,),
    **attrs: Any,
) -> list[np.ndarray[Any, Any]]:
    """The results (of the types given) of one node of the default domain; None: an operand that is
    left out."""
    names = [f"i{i}" if x is not None else "" for i, x in enumerate(operands)]
    given = {n: x for n, x in zip(names, operands, strict=True) if x is not None}
    outs = [f"o{i}" for i in range(len(results))]
    node = helper.make_node(operator, names, outs, **attrs)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for n, x in given.items()
    ]
    outputs = [
        helper.make_tensor_value_info(n, t, None) for n, t in zip(outs, results, strict=True)
    ]
    graph = helper.make_graph([node], "one", inputs, outputs)
    opset = helper.make_opsetid("", onnx.defs.onnx_opset_version())
    model = helper.make_model(graph, opset_imports=[opset])
    source, target = folder / "one.onnx", folder / "one.hb"
    source.write_bytes(model.SerializeToString())
    halfbyte.compile(source, target)
    with halfbyte.load(target, threads=2) as net:
        return list(net.run(given).values())
