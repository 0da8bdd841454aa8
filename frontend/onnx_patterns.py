"""Spellings of what halfbyte has its own kernels for, found in a graph of ONNX ops."""

from __future__ import annotations

from ..ir.graph import Graph
from ..ir.rewrite import Rule, apply_rules
from .onnx_activations import activation_rules
from .onnx_attention import attention_rules
from .onnx_graph import FP4_DYNAMIC_OP
from .onnx_linears import linear_rules
from .onnx_match import Known
from .onnx_model import Model
from .onnx_norms import norm_rules
from .onnx_nvfp4 import nvfp4_rules
from .onnx_rotary import rotary_rules


def recognise(graphs: tuple[Graph, ...], model: Model) -> tuple[Graph, ...]:
    """The graphs with every spelling replaced; decisions are added to the model's log.

    Raises ModelError for a dynamic quantiser that nothing reads as an export means it.
    """
    known = Known(model)
    rules: list[Rule] = [
        *nvfp4_rules(known), *norm_rules(known), *activation_rules(known), *attention_rules(known),
        *rotary_rules(known), *linear_rules(known),
    ]  # fmt: skip
    done: list[Graph] = []
    for graph in graphs:
        newly, log = apply_rules(graph, rules)
        model.log.extend(log)
        _check_quantisers(newly, model)
        done.append(newly)
    return tuple(done)


def _check_quantisers(graph: Graph, model: Model) -> None:
    for op in graph.ops:
        if op.name == FP4_DYNAMIC_OP:
            missed = [e.detail for e in model.log if e.rule == "nvfp4 activations" and not e.fired]
            why = missed[-1] if missed else "its codes are not dequantised"
            raise model.fail_at(op.loc, FP4_DYNAMIC_OP, why, "export the model again")
