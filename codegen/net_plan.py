"""Final ONNX graphs -> the plan of net_plan.cc: values, nodes and programs as constant data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.graph import Attr, Graph, Op, Value, const_values
from ..ir.onnx_ops import ABSENT
from ..ir.ops import lookup
from ..ir.target import Target
from ..ir.text import op_text
from ..ir.types import Plain, TensorType
from . import kernels_net_cuda as cuda
from .kernels import BY_NAME, LINEAR_OPS, Kernel
from .lower import place_of
from .net_linear import linear_of_cpu, linear_of_device
from .net_literals import integer, real, text
from .net_sides import CONTROL, Entry, entry_of, is_device, side_of, sides_of
from .plan import launches_of

_OURS = ("kernels", "launch", "frees", "then", "else", "body", "side")
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
    """Everything net_plan.cc says; `kernels` by table index."""

    programs: tuple[ProgramFacts, ...]
    target: Target
    kernels: tuple[Entry, ...]
    linears: tuple[Kernel, ...]
    weights_bytes: int

    @property
    def on_device(self) -> bool:
        return "cuda" in self.target.features

    def families(self, side: str) -> tuple[tuple[str, str], ...]:
        """The families and variants whose kernels run on a side."""
        return tuple(dict.fromkeys((k.family, k.variant) for k in self.kernels if k.side == side))


def make_net_plan(graphs: Sequence[Graph], target: Target) -> NetPlan:
    """The plan of graphs that went through phase 50. IRError: something is not ready for it."""
    ops = [op for graph in graphs for op in launches_of(graph)]
    entries = dict.fromkeys(entry_of(op, target) for op in ops if op.name not in CONTROL)
    known = {k.name: k for k in cuda.linears(target.name)} if is_device(target) else BY_NAME
    linears = {name: known[name] for op in ops if op.name in LINEAR_OPS
               for name in op.strs("kernels")}  # fmt: skip
    index = {graph.name: i for i, graph in enumerate(graphs)}
    maker = _Maker(target, index, {entry: i for i, entry in enumerate(entries)}, linears)
    ends = [
        v.place.offset + v.place.nbytes for g in graphs for v in g.values() if v.place is not None
    ]
    return NetPlan(
        programs=tuple(map(maker.program, graphs)),
        target=target,
        kernels=tuple(entries),
        linears=tuple(linears.values()),
        weights_bytes=max(ends, default=0),
    )


# --- programs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes programs, of what all of them share: graphs by name, and kernels by table index."""

    target: Target
    index: Mapping[str, int]
    places: Mapping[Entry, int]
    linears: Mapping[str, Kernel]

    def program(self, graph: Graph) -> ProgramFacts:
        ops, const = launches_of(graph), const_values(graph)
        read = [v for op in ops for v in op.args] + list(graph.outs)
        values = dict.fromkeys([*graph.args, *read, *(v for op in ops for v in op.outs)])
        absent = {v for op in graph.ops if op.name == ABSENT for v in op.outs}
        present = [v for v in values if v not in absent]
        numbers = {v: -1 for v in absent} | {v: i for i, v in enumerate(present)}
        return ProgramFacts(
            values=tuple(_item(v, v in const) for v in present),
            nodes=tuple(self._node(op, numbers) for op in ops),
            inputs=tuple(numbers[v] for v in graph.args),
            outputs=tuple(numbers[v] for v in graph.outs),
            input_types=tuple(_type_name(v.type) for v in graph.args),
            output_types=tuple(_type_name(v.type) for v in graph.outs),
            ops=ops,
        )

    def _node(self, op: Op, numbers: Mapping[Value, int]) -> NodeFacts:
        kind, bodies = CONTROL.get(op.name, ("LAUNCH", ()))
        attrs = {k: v for k, v in op.attrs.items() if k not in _OURS}
        is_linear = op.name in LINEAR_OPS
        named = {v.name: i for v, i in numbers.items()}
        return NodeFacts(
            op=text(lookup(op).onnx or op.name),
            name=text(op.loc or str(op.out)),
            kind=kind,
            kernel=self.places[entry_of(op, self.target)] if kind == "LAUNCH" else 0,
            ins=tuple(numbers[v] for v in op.args),
            in_types=tuple(_type_name(v.type) if numbers[v] >= 0 else "NO_TYPE" for v in op.args),
            sides=sides_of(op, self.target),
            side=side_of(op, self.target).upper(),
            outs=tuple(numbers[v] for v in op.outs),
            attrs=() if is_linear else tuple(_attr(i, k, attrs[k]) for i, k in enumerate(attrs)),
            dead=tuple(named[name] for name in op.strs("frees")),
            programs=tuple(self.index[op.get(body, "")] for body in bodies),
            linear=self._linear(op) if is_linear else "",
            comment=op_text(op).replace("\\", "/").replace("\n", " "),
        )

    def _linear(self, op: Op) -> str:
        facts = linear_of_device if is_device(self.target) else linear_of_cpu
        return facts(op, self.linears)


def _type_name(type_: TensorType) -> str:
    is_plain = isinstance(type_.enc, Plain) and type_.enc == Plain(type_.enc.dtype)
    return type_.enc.dtype.upper() if is_plain and isinstance(type_.enc, Plain) else "NO_TYPE"


def _item(v: Value, is_const: bool) -> Item:
    if not is_const:
        return Item(v.name)
    return Item(v.name, place_of(v).offset, _type_name(v.type), v.type.static)


def _attr(place: int, name: str, value: Attr) -> AttrFacts:
    at = text(name)
    if isinstance(value, str):
        return AttrFacts(at, "TEXT", place, text=text(value))
    if isinstance(value, int):
        return AttrFacts(at, "INT", place, integer=integer(value))
    if isinstance(value, float):
        return AttrFacts(at, "FLOAT", place, real=real(value))
    if value and isinstance(value[0], str):
        return AttrFacts(at, "TEXT", place, text=text(",".join(map(str, value))))
    if value and isinstance(value[0], float):
        reals = tuple(real(float(v)) for v in value)
        return AttrFacts(at, "FLOATS", place, items=reals, count=len(reals))
    integers = tuple(integer(int(v)) for v in value)
    return AttrFacts(at, "INTS", place, items=integers, count=len(integers))
