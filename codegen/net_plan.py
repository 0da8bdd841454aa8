"""Final ONNX graphs -> net_plan.cc: values, nodes and programs as constant data, kernels by ISA."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..ir.errors import IRError
from ..ir.graph import Attr, Graph, Op, Value, const_values
from ..ir.onnx_ops import ABSENT
from ..ir.ops import lookup
from ..ir.ops_fused import role
from ..ir.text import op_text
from ..ir.types import Nvfp4, Plain, TensorType
from . import kernels
from .isa import ISAS, SCALAR, Isa
from .kernels import FAMILIES as LINEAR_FAMILIES
from .kernels import LINEAR_OPS
from .kernels_net import BUCKETS, BY_OP, C_TYPES, FEW, MANY, isas_of
from .lower import PROLOGUES, place_of
from .plan import launches_of, variant_of
from .render import Source, family_sources, source

FOLDER = "net"
RUNTIME_SOURCES = ("memory.cc", "executor.cc", "control.cc")
SHARED_SOURCES = ("team.cc", "cpuid.cc", "ffi.cc", "registry.cc")
EXPORTS: Mapping[str, int] = {
    "create": 3, "destroy": 1, "isa": 1, "inputs": 2, "input": 4, "run": 1, "launch": 3,
    "result": 3, "fetch": 3, "system_calls": 1,
}  # fmt: skip
"""The functions of the library, and how many arguments each takes."""

SYMBOLS = tuple(f"__tvm_ffi_{name}" for name in EXPORTS)
LINEAR = "linear"
CONTROL = {"onnx_if": ("IF", ("then", "else")), "onnx_loop": ("LOOP", ("body",)),
           "onnx_scan": ("SCAN", ("body",))}  # fmt: skip
_OURS = ("kernels", "launch", "frees", "then", "else", "body")
"""Attributes that are no operator's."""


@dataclass(frozen=True, slots=True)
class Item:
    """A value of a program; `offset` -1 and no type unless it is a constant."""

    name: str
    offset: int = -1
    type: str = "NO_TYPE"
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AttrFacts:
    """An attribute as C++ literals."""

    name: str
    kind: str
    place: int
    integer: str = "0"
    real: str = "0"
    text: str = "nullptr"
    items: tuple[str, ...] = ()
    count: int = -1


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One launch as C++ literals and value numbers; -1 where an operand is absent."""

    op: str
    name: str
    kind: str
    kernel: int
    ins: tuple[int, ...]
    in_types: tuple[str, ...]
    sides: tuple[str, ...]
    side: str
    outs: tuple[int, ...]
    attrs: tuple[AttrFacts, ...]
    dead: tuple[int, ...]
    programs: tuple[int, ...]
    linear: str
    comment: str


@dataclass(frozen=True, slots=True)
class ProgramFacts:
    """A graph or body: `ops` in the order of `nodes`."""

    values: tuple[Item, ...]
    nodes: tuple[NodeFacts, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_types: tuple[str, ...]
    output_types: tuple[str, ...]
    ops: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class NetPlan:
    """Everything net_plan.cc says. `kernels`: (symbol, family, variant) by table index."""

    programs: tuple[ProgramFacts, ...]
    kernels: tuple[tuple[str, str, str], ...]
    linears: tuple[kernels.Kernel, ...]
    weights_bytes: int
    families: tuple[tuple[str, str], ...] = field(default=())


def make_net_plan(graphs: Sequence[Graph]) -> NetPlan:
    """The plan of graphs that went through phase 50. IRError: something is not ready for it."""
    index = {graph.name: i for i, graph in enumerate(graphs)}
    table: dict[str, tuple[str, str, str]] = {}
    for graph in graphs:
        for op in launches_of(graph):
            if op.name not in CONTROL:
                entry = _kernel_of(op)
                table.setdefault(entry[0], entry)
    places = {name: i for i, name in enumerate(table)}
    programs = tuple(_program(graph, index, places) for graph in graphs)
    linear_names = dict.fromkeys(
        name
        for graph in graphs
        for op in launches_of(graph)
        if op.name in LINEAR_OPS
        for name in op.strs("kernels")
    )
    found = tuple(table.values())
    ends = [
        v.place.offset + v.place.nbytes for g in graphs for v in g.values() if v.place is not None
    ]
    families = tuple(dict.fromkeys((family, variant) for _, family, variant in found))
    linears = tuple(kernels.BY_NAME[name] for name in linear_names)
    return NetPlan(programs, found, linears, max(ends, default=0), families)


def _kernel_of(op: Op) -> tuple[str, str, str]:
    if op.name in LINEAR_OPS:
        return LINEAR, LINEAR, ""
    kernel = BY_OP[op.name]
    variant = kernel.variant(op)
    symbol = f"{kernel.name}_{variant}" if variant else kernel.name
    return symbol, kernel.family, variant


# --- programs -------------------------------------------------------------------------------------


def _type_name(type_: TensorType) -> str:
    is_plain = isinstance(type_.enc, Plain) and type_.enc == Plain(type_.enc.dtype)
    return type_.enc.dtype.upper() if is_plain and isinstance(type_.enc, Plain) else "NO_TYPE"


def _program(graph: Graph, index: Mapping[str, int], places: Mapping[str, int]) -> ProgramFacts:
    ops = launches_of(graph)
    const = const_values(graph)
    read = [v for op in ops for v in op.args] + list(graph.outs)
    values = dict.fromkeys([*graph.args, *read, *(v for op in ops for v in op.outs)])
    numbers: dict[Value, int] = {}
    items: list[Item] = []
    absent = {v for op in graph.ops if op.name == ABSENT for v in op.outs}
    for v in values:
        if v in absent:
            numbers[v] = -1
            continue
        numbers[v] = len(items)
        items.append(_item(v, v in const))
    named = {v.name: i for v, i in numbers.items()}
    nodes = tuple(_node(op, numbers, named, index, places) for op in ops)
    return ProgramFacts(
        values=tuple(items),
        nodes=nodes,
        inputs=tuple(numbers[v] for v in graph.args),
        outputs=tuple(numbers[v] for v in graph.outs),
        input_types=tuple(_type_name(v.type) for v in graph.args),
        output_types=tuple(_type_name(v.type) for v in graph.outs),
        ops=ops,
    )


def _item(v: Value, is_const: bool) -> Item:
    if not is_const:
        return Item(v.name)
    return Item(v.name, place_of(v).offset, _type_name(v.type), v.type.static)


def _node(
    op: Op,
    numbers: Mapping[Value, int],
    named: Mapping[str, int],
    index: Mapping[str, int],
    places: Mapping[str, int],
) -> NodeFacts:
    kind, bodies = CONTROL.get(op.name, ("LAUNCH", ()))
    attrs = {k: v for k, v in op.attrs.items() if k not in _OURS}
    is_linear = op.name in LINEAR_OPS
    return NodeFacts(
        op=_text(lookup(op).onnx or op.name),
        name=_text(op.loc or str(op.out)),
        kind=kind,
        kernel=places[_kernel_of(op)[0]] if kind == "LAUNCH" else 0,
        ins=tuple(numbers[v] for v in op.args),
        in_types=tuple(_type_name(v.type) if numbers[v] >= 0 else "NO_TYPE" for v in op.args),
        sides=("HOST",) * len(op.args),
        side="HOST",
        outs=tuple(numbers[v] for v in op.outs),
        attrs=() if is_linear else tuple(_attr(i, k, attrs[k]) for i, k in enumerate(attrs)),
        dead=tuple(named[name] for name in op.strs("frees")),
        programs=tuple(index[op.get(body, "")] for body in bodies),
        linear=_linear(op) if is_linear else "",
        comment=op_text(op).replace("\\", "/").replace("\n", " "),
    )


def _text(text: str) -> str:
    """A C++ literal: JSON's escapes are C++'s but for bytes outside ASCII and question marks."""
    escaped = json.dumps(text.encode("ascii", "replace").decode())
    return escaped.replace("\\u00", "\\x").replace("??", "?\\?")


def _real(value: float) -> str:
    if np.isnan(value):
        return '__builtin_nanf("")'
    if np.isinf(value):
        return "-__builtin_inff()" if value < 0 else "__builtin_inff()"
    text = str(np.float32(value))
    return (text if any(mark in text for mark in ".e") else text + ".0") + "f"


def _integer(value: int) -> str:
    return "INT64_MIN" if value == -(2**63) else f"{int(value)}"


def _attr(place: int, name: str, value: Attr) -> AttrFacts:
    at = _text(name)
    if isinstance(value, str):
        return AttrFacts(at, "TEXT", place, text=_text(value))
    if isinstance(value, int):
        return AttrFacts(at, "INT", place, integer=_integer(value))
    if isinstance(value, float):
        return AttrFacts(at, "FLOAT", place, real=_real(value))
    if value and isinstance(value[0], str):
        return AttrFacts(at, "TEXT", place, text=_text(",".join(map(str, value))))
    if value and isinstance(value[0], float):
        reals = tuple(_real(float(v)) for v in value)
        return AttrFacts(at, "FLOATS", place, items=reals, count=len(reals))
    integers = tuple(_integer(int(v)) for v in value)
    return AttrFacts(at, "INTS", place, items=integers, count=len(integers))


# --- linears --------------------------------------------------------------------------------------


def _linear(op: Op) -> str:
    """The LinearFacts of linear.h."""
    few, many = (kernels.BY_NAME[op.strs("kernels")[BUCKETS.index(b)]] for b in (FEW, MANY))
    w = op.args[1].type
    n, k = w.static
    offsets = {part.suffix: at for at, part in w.placed_parts()}
    at = {
        name: -1 if (value := role(op, name)) is None else op.args.index(value)
        for name in ("bias", "residual", "gamma", "row_scale", "input_scale")
    }
    scale_at = offsets["gs"] if isinstance(w.enc, Nvfp4) else -1
    few_space = few.decl.workspace(op, FEW)
    parts = (
        _launcher(few, few_space.shared, 0, few_space.per_thread),
        _launcher(many, *_affine(op, many)),
        f"{FEW}, {n}, {k}, {', '.join(map(str, at.values()))}",
        str(int(PROLOGUES[op.get("prologue", "none")])),
        _real(op.get("eps", 0.0)),
        str(scale_at),
    )
    return "{" + ", ".join(parts) + "}"


def _launcher(kernel: kernels.Kernel, base: int, per_row: int, per_thread: int) -> str:
    return f"{{l_{kernel.name}, {base}, {per_row}, {per_thread}}}"


def _affine(op: Op, kernel: kernels.Kernel) -> tuple[int, int, int]:
    """Workspace of many rows: base, per row, per thread. IRError: it is not affine in the rows."""
    small, large, larger = (kernel.decl.workspace(op, rows) for rows in (1024, 2048, 4096))
    per_row, rest = divmod(large.shared - small.shared, 1024)
    if rest or larger.shared - large.shared != 2048 * per_row:
        raise IRError(f"{kernel.name}: workspace is not affine in the rows")
    return small.shared - 1024 * per_row, per_row, larger.per_thread


# --- sources --------------------------------------------------------------------------------------


def net_sources(plan: NetPlan, isas: Sequence[Isa]) -> list[Source]:
    """Every translation unit of the library for these ISAs (SCALAR must be among them)."""
    units = [
        replace(
            source(f"{family}.cc", isa, FOLDER, variant=variant, c_type=C_TYPES.get(variant, "")),
            name=".".join(filter(None, (family, variant, isa.name, "cc"))),
        )
        for family, variant in plan.families
        for isa in isas_of(family, variant)
        if isa in isas
    ]
    used = {kernel.family for kernel in plan.linears}
    linear_units = family_sources(
        {f: tuple(i for i in LINEAR_FAMILIES[f] if i in isas) for f in sorted(used)}
    )
    fixed = [source(name, None, FOLDER) for name in RUNTIME_SOURCES]
    shared = [source(name) for name in SHARED_SOURCES]
    exports = source("exports.cc", None, FOLDER, exports=EXPORTS.items())
    return [*units, *linear_units, *fixed, *shared, exports, _plan_source(plan, isas)]


def _plan_source(plan: NetPlan, isas: Sequence[Isa]) -> Source:
    tables = [(isa, _table(plan, isa) if isa in isas else None) for isa in ISAS]
    spaces = [
        (k.name, [variant_of(k, isa).name if isa in isas else "" for isa in ISAS])
        for k in plan.linears
    ]
    names = [(i, [k.name for k in plan.linears if i in k.isas]) for i in isas]
    return source(
        "net_plan.cc", None, FOLDER, programs=plan.programs, weights_bytes=plan.weights_bytes,
        tables=tables, linear_tables=spaces, linear_names=names,
    )  # fmt: skip


def _table(plan: NetPlan, isa: Isa) -> list[tuple[str, str]]:
    """For each kernel, the namespace of its best variant up to `isa`."""
    by_name = {known.name: known for known in ISAS}

    def best(family: str, variant: str) -> str:
        at, have = isa, isas_of(family, variant)
        while at not in have and at is not SCALAR:
            at = by_name[at.base]
        return at.name

    return [(symbol, best(family, variant)) for symbol, family, variant in plan.kernels]
