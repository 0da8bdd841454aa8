"""Small ONNX models for tests, and the files that they are written to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from halfbyte.frontend.onnx_evaluator import run_model
from halfbyte.frontend.onnx_importer import OnnxImported, import_onnx
from halfbyte.frontend.onnx_names import OP_OF
from halfbyte.ir.onnx_ops import ABSENT, NOTHING, by_evaluator
from halfbyte.ir.opdef import OpDef
from halfbyte.ir.ops import OPS
from tests.onnx_meaning import run

NEWEST = onnx.defs.onnx_opset_version()
Dims = Sequence[int | str | None]
node = helper.make_node


def model(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, tuple[int, Dims]],
    outputs: Sequence[str],
    constants: Mapping[str, Any] | None = None,
    opset: int = NEWEST,
    functions: Sequence[FunctionProto] = (),
    domains: Sequence[str] = (),
) -> ModelProto:
    """A model; outputs are declared f32 of unknown shape, constants may be TensorProtos."""
    stored = [
        c if isinstance(c, TensorProto) else numpy_helper.from_array(np.asarray(c), name)
        for name, c in (constants or {}).items()
    ]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, t, list(d)) for n, (t, d) in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        stored,
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions))


def imported(proto: ModelProto, folder: Path, **dims: int) -> OnnxImported:
    """The model through a file."""
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return import_onnx(path, dims=dims)


def agrees(
    proto: ModelProto, folder: Path, inputs: Mapping[str, Any], rtol: float = 1e-5
) -> OnnxImported:
    """Import, and compare with onnx's evaluator on the file as it was."""
    found = imported(proto, folder)
    wanted = run_model(proto, inputs)
    for ours, theirs in zip(run(found, inputs), wanted, strict=True):
        expected: Any = np.asarray(theirs)
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=rtol, atol=1e-6)
    return found


def names(found: OnnxImported) -> list[str]:
    """The ops of the main graph that compute, in order."""
    return [op.name for op in found.graphs[0].ops if op.name not in ("weight", "absent")]


def with_every_operator(patch: pytest.MonkeyPatch) -> None:
    """An op table that has all operators of the default domain: what the importer makes of a graph
    does not hang on which kernels there are.
    """
    if ABSENT not in OPS:
        patch.setitem(OPS, ABSENT, OpDef("", 0, 0, lambda op: NOTHING, by_evaluator))
    for schema in onnx.defs.get_all_schemas():
        name = schema.name
        if not schema.domain and name not in OP_OF and "Sequence" not in name:
            entry = OpDef("", 0, 64, lambda op: (), by_evaluator, onnx=name)
            ours = "onnx_" + re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=S)(?=N)", "_", name).lower()
            patch.setitem(OPS, ours, entry)
            patch.setitem(OP_OF, name, ours)
