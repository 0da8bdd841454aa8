"""What an imported ONNX graph means: every op by onnx's reference evaluator, control flow by hand.

Slow and independent of code generation: the oracle of the importer's tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from halfbyte.frontend.onnx_evaluator import run_model
from halfbyte.frontend.onnx_importer import OnnxImported
from halfbyte.frontend.onnx_schemas import schema_of
from halfbyte.ir import interp
from halfbyte.ir.graph import Graph, Op, Value
from halfbyte.ir.ops import OPS

Data = Any


def run(imported: OnnxImported, inputs: Mapping[str, Data]) -> list[Data]:
    """The outputs of the main graph, inputs by their ONNX names."""
    main = imported.graphs[0]
    args = [inputs[port.name] for port in imported.inputs]
    return _Machine(imported).graph(main, args)


class _Machine:
    def __init__(self, imported: OnnxImported) -> None:
        self.weights = imported.weights
        self.graphs = {g.name: g for g in imported.graphs}

    def graph(self, graph: Graph, args: Sequence[Data]) -> list[Data]:
        values: dict[Value, Data] = dict(zip(graph.args, args, strict=True))
        for op in graph.ops:
            operands = [values[v] for v in op.args]
            values.update(zip(op.outs, self.op(op, operands), strict=False))
        return [values[v] for v in graph.outs]

    def op(self, op: Op, args: list[Data]) -> Sequence[Data]:
        match op.name:
            case "weight":
                return [self.weights(op.get("source", ""))]
            case "absent":
                return [None]
            case "onnx_if":
                branch = "then" if np.asarray(args[0]).item() else "else"
                captured = [args[i] for i in op.ints(f"{branch}_captures")]
                return self.graph(self.graphs[op.get(branch, "")], captured)
            case "onnx_loop":
                return self.loop(op, args)
            case "onnx_scan":
                return self.scan(op, args)
            case _ if OPS[op.name].onnx:
                return by_evaluator(op, args)
            case _:
                return interp.evaluate(op, args)

    def loop(self, op: Op, args: list[Data]) -> list[Data]:
        body, carried = self.graphs[op.get("body", "")], op.get("carried", 0)
        trip = None if args[0] is None else int(np.asarray(args[0]).item())
        going = args[1] is None or bool(np.asarray(args[1]).item())
        state, captured = args[2 : 2 + carried], args[2 + carried :]
        scanned: list[list[Data]] = [[] for _ in body.outs[1 + carried :]]
        i = 0
        while going and (trip is None or i < trip):
            outs = self.graph(body, [np.array(i, np.int64), np.array(going), *state, *captured])
            going, state = bool(np.asarray(outs[0]).item()), outs[1 : 1 + carried]
            for rows, row in zip(scanned, outs[1 + carried :], strict=True):
                rows.append(row)
            i += 1
        return [*state, *(np.stack(rows) for rows in scanned)]

    def scan(self, op: Op, args: list[Data]) -> list[Data]:
        body, states = self.graphs[op.get("body", "")], op.get("states", 0)
        axes, directions = op.ints("scan_input_axes"), op.ints("scan_input_directions")
        state, slices = args[:states], args[states : states + len(axes)]
        captured = args[states + len(axes) :]
        moved = [np.moveaxis(x, a, 0) for x, a in zip(slices, axes, strict=True)]
        moved = [x[::-1] if d else x for x, d in zip(moved, directions, strict=True)]
        scanned: list[list[Data]] = [[] for _ in body.outs[states:]]
        for i in range(moved[0].shape[0]):
            outs = self.graph(body, [*state, *(x[i] for x in moved), *captured])
            state = outs[:states]
            for rows, row in zip(scanned, outs[states:], strict=True):
                rows.append(row)
        stacked = [np.stack(r) for r in scanned]
        outward = zip(
            stacked, op.ints("scan_output_axes"), op.ints("scan_output_directions"), strict=True
        )
        return [*state, *(np.moveaxis(x[::-1] if d else x, 0, a) for x, a, d in outward)]


def by_evaluator(op: Op, args: Sequence[Data]) -> list[Data]:
    """One operator of the newest opset. A tensor-valued attribute stands behind the operands."""
    schema = schema_of(OPS[op.name].onnx, "")
    assert schema is not None
    tensors = [n for n, a in schema.attributes.items() if a.type.name == "TENSOR"]
    attrs: dict[str, Any] = dict(op.attrs)
    args = list(args)
    while tensors and len(args) > schema.min_input:
        attrs[tensors.pop()] = numpy_helper.from_array(args.pop())
    names = ["" if arg is None else f"i{i}" for i, arg in enumerate(args)]
    outs = [f"o{i}" for i in range(len(op.outs))]
    node = helper.make_node(OPS[op.name].onnx, names, outs, **attrs)
    given = {n: np.asarray(a) for n, a in zip(names, args, strict=True) if n}
    undefined = onnx.TensorProto.UNDEFINED
    graph = helper.make_graph(
        [node],
        "node",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in given.items()
        ],
        [helper.make_tensor_value_info(n, undefined, None) for n in outs],
    )
    opset = helper.make_opsetid("", onnx.defs.onnx_opset_version())
    results: Sequence[Data] = run_model(helper.make_model(graph, opset_imports=[opset]), given)
    return [np.asarray(r) for r in results]
