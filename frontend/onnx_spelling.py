"""Every node in one spelling: the newest opset of the installed onnx package, domain "" wherever
an operator of another domain means something that ONNX can say.

A node is first held against the schema of its own opset: operator, operands, attributes.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import NodeProto

from .onnx_contrib import CONTRIB
from .onnx_facades import TRT
from .onnx_model import NEWEST, SHOWN, Patch, operator
from .onnx_opset import OLDER
from .onnx_schemas import Schema, schema_of

STANDARD = ("", "ai.onnx.ml", "ai.onnx.preview", "ai.onnx.preview.training")


def spell(node: NodeProto, opsets: Mapping[str, int], patch: Patch) -> None:
    """Write the node newly into the patch. Raises ModelError for one that cannot be."""
    if node.domain == "com.microsoft" and node.op_type in CONTRIB:
        CONTRIB[node.op_type](node, 1, patch)
    elif node.domain == "trt" and node.op_type in TRT:
        TRT[node.op_type](node, 1, patch)
    elif node.domain in STANDARD:
        _standard(node, _opset(node, opsets, patch), patch)
    else:
        known = ", ".join(sorted(CONTRIB))
        raise patch.fail(
            f"unknown operator {operator(node)[:SHOWN]!r}, expected one of ONNX, a function of "
            f"the model, or of com.microsoft: {known}",
            "export the model with standard operators",
        )


def _opset(node: NodeProto, opsets: Mapping[str, int], patch: Patch) -> int:
    version = opsets.get(node.domain)
    if version is None:
        raise patch.fail(f"the model imports no opset of domain {node.domain!r}", "export it again")
    if not node.domain and version > NEWEST:
        raise patch.fail(
            f"opset {version}, and the installed onnx package knows up to {NEWEST}",
            "update the onnx package, or export with an older opset",
        )
    return version


def _standard(node: NodeProto, opset: int, patch: Patch) -> None:
    schema = schema_of(node.op_type, node.domain, opset)
    if node.op_type == "SimplifiedLayerNormalization" and not node.domain:
        CONTRIB[node.op_type](node, opset, patch)  # onnxruntime has it in the default domain
        return
    if schema is None:
        raise patch.fail(
            f"opset {opset} has no operator {operator(node)[:SHOWN]!r}", "export the model again"
        )
    if why := _mismatch(node, schema):
        raise patch.fail(f"{why} (opset {opset})", "export the model again")
    rule = OLDER.get(node.op_type) if not node.domain else None
    if rule is None:
        patch.keep(node)
    else:
        rule(node, opset, patch)


def _mismatch(node: NodeProto, schema: Schema) -> str:
    """How the node differs from its schema, "" where it does not."""
    if not schema.min_input <= len(node.input) <= schema.max_input:
        return f"{len(node.input)} operands, expected {schema.min_input} to {schema.max_input}"
    if len(node.output) > schema.max_output:
        return f"{len(node.output)} results, expected at most {schema.max_output}"
    for i, formal in enumerate(schema.inputs[: len(node.input)]):
        if not node.input[i] and formal.option.name != "Optional":
            return f"operand {i} ({formal.name}) is left out, and is not optional"
    names = [a.name for a in node.attribute]
    if len(set(names)) != len(names):
        return "an attribute is given twice"
    for attr in node.attribute:
        formal = schema.attributes.get(attr.name)
        if formal is None:
            return f"unknown attribute {attr.name[:SHOWN]!r}"
        if int(attr.type) != formal.type.value:
            return f"attribute {attr.name} is of type {attr.type}, expected {formal.type.name}"
    missing = [n for n, a in schema.attributes.items() if a.required and n not in names]
    return f"attribute {missing[0]} is missing" if missing else ""
