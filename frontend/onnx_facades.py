"""Operators of TensorRT (domain trt) in quantised exports, and faces of them that onnx knows.

onnx cannot infer through a domain of strangers. A facade is a model-local function with the types
and shapes of the real operator, put into the model for inference only; the meaning is ours
(onnx_nvfp4.py turns the node into an op of the op table).
Reference: nvidia-modelopt 0.47, `onnx/export/nvfp4_exporter.py` and `quantization/export_onnx.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from .onnx_model import NEWEST, Patch, Spelling, integer

FP4_DYNAMIC = "TRT_FP4DynamicQuantize"
BLOCK = 16


def _fp4_dynamic() -> FunctionProto:
    """x [..., K], s -> e2m1 [..., K], e4m3 [..., K / 16]: types and shapes, no values."""
    bounds = {"starts": [0], "ends": [2**31 - 1], "axes": [-1], "steps": [BLOCK]}
    constants = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(value)))
        for name, value in bounds.items()
    ]
    nodes = [
        *constants,
        helper.make_node("Cast", ["x"], ["codes"], to=TensorProto.FLOAT4E2M1),
        helper.make_node("Slice", ["x", *bounds], ["firsts"]),
        helper.make_node("Cast", ["firsts"], ["scales"], to=TensorProto.FLOAT8E4M3FN),
    ]
    return helper.make_function(
        "trt", FP4_DYNAMIC, ["x", "s"], ["codes", "scales"], nodes,
        [helper.make_opsetid("", NEWEST)], ["axis", "block_size", "scale_type"],
    )  # fmt: skip


def _dynamic_quantize(node: NodeProto, opset: int, patch: Patch) -> None:
    if len(node.input) != 2 or len(node.output) != 2:
        raise patch.fail("expected operands x and scale, results codes and scales", "export again")
    facts = (integer(node, "block_size", BLOCK), integer(node, "axis", -1))
    if facts != (BLOCK, -1) or integer(node, "scale_type", 17) != TensorProto.FLOAT8E4M3FN:
        raise patch.fail(
            f"block_size {facts[0]} along axis {facts[1]}, expected blocks of 16 of the last axis "
            "with e4m3 scales", "export with the NVFP4 defaults"
        )  # fmt: skip
    patch.model.facades[FP4_DYNAMIC] = _fp4_dynamic()
    patch.keep(node)


def _unfinished(node: NodeProto, opset: int, patch: Patch) -> None:
    raise patch.fail(
        "a placeholder of an export that was not finished: its weights are not quantised",
        "run ModelOpt's NVFP4 exporter over the model (post_process) first",
    )


TRT: Mapping[str, Spelling] = {FP4_DYNAMIC: _dynamic_quantize, "TRT_FP4QDQ": _unfinished}
