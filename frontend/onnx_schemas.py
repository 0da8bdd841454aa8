"""onnx's schemas of operators, typed: what its C++ classes have, its stubs leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from onnx import AttributeProto, FunctionProto, NodeProto, TypeProto, defs, shape_inference


class Kind(Protocol):
    """An enumerator of C++."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...


class Formal(Protocol):
    """A formal operand."""

    @property
    def name(self) -> str: ...
    @property
    def option(self) -> Kind: ...


class FormalAttribute(Protocol):
    """A formal attribute; its default has no name where there is none."""

    @property
    def required(self) -> bool: ...
    @property
    def type(self) -> Kind: ...
    @property
    def default_value(self) -> AttributeProto: ...


class Schema(Protocol):
    """One version of an operator."""

    min_input: int
    max_input: int
    max_output: int
    inputs: Sequence[Formal]
    attributes: Mapping[str, FormalAttribute]
    has_function: bool
    has_context_dependent_function: bool
    function_opset_versions: Sequence[int]
    context_dependent_function_opset_versions: Sequence[int]

    def get_function_with_opset_version(self, version: int) -> bytes: ...
    def get_context_dependent_function_with_opset_version(
        self, version: int, node: bytes, types: Sequence[bytes]
    ) -> bytes: ...


def schema_of(op_type: str, domain: str, opset: int | None = None) -> Schema | None:
    """The operator as `opset` has it, or its newest version; None where there is none."""
    try:
        found = (
            defs.get_schema(op_type, domain)
            if opset is None
            else defs.get_schema(op_type, opset, domain)
        )
    except Exception:  # onnx raises a SchemaError that it does not export
        return None
    return cast(Schema, found)


def function_of(
    schema: Schema, node: NodeProto, types: Sequence[TypeProto | None]
) -> FunctionProto | None:
    """The newest function that defines the operator; None where it has none, or asks for types of
    operands that are not known (None).
    """
    if schema.has_function:
        version = max(schema.function_opset_versions)
        data = schema.get_function_with_opset_version(version)
    elif schema.has_context_dependent_function and all(t is not None for t in types):
        version = max(schema.context_dependent_function_opset_versions)
        known = [t.SerializeToString() for t in types if t is not None]
        data = schema.get_context_dependent_function_with_opset_version(
            version, node.SerializeToString(), known
        )
    else:
        return None
    function = FunctionProto()
    function.ParseFromString(data)
    return function if function.node else None


def is_sound(function: FunctionProto, node: NodeProto, types: Sequence[TypeProto | None]) -> bool:
    """Whether onnx can type the function's nodes on operands of these types."""
    try:
        known = [t for t in types if t is not None]
        shape_inference.infer_function_output_types(function, known, list(node.attribute))
    except Exception:  # C++ exceptions of several kinds
        return False
    return True
