"""Inputs and outputs of an ONNX graph: what a caller hands in, and the extents that vary.

Symbols of the file become D0, D1 … in the order of the inputs, so that a shape prints and parses
whatever its author called an extent; extents that the user binds become numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnx import GraphProto, TypeProto, ValueInfoProto

from ..ir.errors import ModelError
from ..ir.graph import Value
from ..ir.onnx_ops import DTYPES
from ..ir.types import UNRANKED, Dim
from .onnx_tensors import MAX_RANK, dtype_name

SHOWN = 80


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output. `dims` in the file's own words: numbers, its symbols, "?" for unknown;
    None where not even the rank is known. `value` is the IR value's name.
    """

    name: str
    dtype: str
    dims: tuple[Dim, ...] | None
    value: str


@dataclass(frozen=True, slots=True)
class Symbols:
    """`canonical`: the file's symbol -> ours."""

    canonical: Mapping[str, str]

    def theirs(self, dim: Dim) -> Dim:
        """An extent in the file's words."""
        names = {ours: theirs for theirs, ours in self.canonical.items()}
        return names.get(dim, dim) if isinstance(dim, str) else dim


def bind(graph: GraphProto, dims: Mapping[str, int], file: Path) -> Symbols:
    """Write bound extents and canonical symbols into the graph's inputs.

    `dims`: by the symbol of the file, or `INPUT.AXIS` where an extent has no name. Raises
    ModelError for what is no such extent, and for inputs that are not tensors.
    """
    canonical: dict[str, str] = {}
    used: set[str] = set()
    for value in graph.input:
        _check(value, file)
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            symbol, place = dim.dim_param, f"{value.name}.{axis}"
            bound = next((k for k in (symbol, place) if k and k in dims), None)
            if dim.HasField("dim_value") and dim.dim_value >= 0:
                continue
            if bound is not None:
                used.add(bound)
                dim.dim_value = dims[bound]
            elif symbol:
                dim.dim_param = canonical.setdefault(symbol, f"D{len(canonical)}")
            else:
                dim.Clear()
    _check_bound(graph, dims, used, sorted(canonical), file)
    return Symbols(canonical)


def _check(value: ValueInfoProto, file: Path) -> None:
    type_ = value.type
    if not type_.HasField("tensor_type") or type_.tensor_type.elem_type not in DTYPES:
        raise ModelError(
            f"{file}: input {value.name[:SHOWN]!r} is {kind(type_)}, expected a tensor of "
            "numbers; export the model with tensors as inputs"
        )
    if len(type_.tensor_type.shape.dim) > MAX_RANK:
        raise ModelError(
            f"{file}: input {value.name[:SHOWN]!r} has {len(type_.tensor_type.shape.dim)} "
            f"dimensions, expected at most {MAX_RANK}; export it with fewer"
        )


def _check_bound(
    graph: GraphProto, dims: Mapping[str, int], used: set[str], symbols: list[str], file: Path
) -> None:
    for name, extent in dims.items():
        if extent < 0:
            raise ModelError(f"{file}: dimension {name}={extent}, expected 0 or more")
    if left := sorted(dims.keys() - used):
        some = [*symbols, *(f"{v.name}.AXIS" for v in graph.input)]
        raise ModelError(
            f"{file}: dimension {left[0][:SHOWN]!r} is none that varies, expected one of "
            f"{', '.join(some[:8])}; bind one of these"
        )


def kind(type_: TypeProto) -> str:
    """What a type is, for messages."""
    which = type_.WhichOneof("value")
    if which == "tensor_type":
        return f"a tensor of {dtype_name(type_.tensor_type.elem_type)}"
    return "of no type" if which is None else f"a {which.removesuffix('_type')}"


def port(name: str, value: Value, symbols: Symbols) -> Port:
    """The facts of an input or output, from the value that stands for it."""
    shape = value.type.shape
    dims = None if shape == UNRANKED else tuple(symbols.theirs(d) for d in shape)
    return Port(name, str(value.type.enc), dims, value.name)
