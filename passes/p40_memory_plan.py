"""40: every value gets its place, so that a step allocates nothing.

Activations live in one arena. Each is a fixed number of bytes per token, so one plan in bytes per
token serves every bucket: a bucket of B tokens multiplies all offsets by B. Caches live in the
state, weights in the weight file, logits in the caller's buffer.

Shapes of an ONNX graph may be known only to a run: each op says which values end with it, and the
executor gives their memory to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import IRError
from ..ir.graph import Graph, Op, Place, Value, const_values
from ..ir.ops import lookup
from ..ir.rewrite import LogEntry
from ..ir.types import ALIGNMENT, DTYPE_BYTES, Plain, align
from .context import Context, Outcome
from .launches import launched
from .onnx_lifetimes import check_frees, frees, is_onnx

ARENA, STATE, WEIGHTS, OUT = "arena", "state", "weights", "out"


@dataclass(frozen=True, slots=True)
class Lifetime:
    """An arena value, alive from the launch that makes it to the last that reads it, inclusive."""

    value: Value
    start: int
    stop: int
    nbytes: int

    def overlaps(self, other: Lifetime) -> bool:
        return self.start <= other.stop and other.start <= self.stop


def bytes_per_token(v: Value) -> int:
    """Bytes of one row of an activation, up to a cache line."""
    if not isinstance(v.type.enc, Plain):
        raise IRError(f"40_memory_plan: {v} is {v.type}, not a plain activation")
    return align(v.type.last * DTYPE_BYTES[v.type.enc.dtype])


def lifetimes(graph: Graph) -> list[Lifetime]:
    """Of every activation that is neither a result of the graph nor shares a state's memory."""
    ops = launched(graph)
    last = {v: i for i, op in enumerate(ops) for v in op.args}
    found: list[Lifetime] = []
    for i, op in enumerate(ops):
        for v, shared in zip(op.outs, lookup(op).inplace, strict=True):
            if shared is None and v not in graph.outs:
                found.append(Lifetime(v, i, last.get(v, i), bytes_per_token(v)))
    return found


def assign(found: list[Lifetime]) -> dict[Value, Place]:
    """First fit, in order of birth: the lowest offset free of every live neighbour."""
    places: dict[Value, Place] = {}
    done: list[Lifetime] = []
    for life in found:
        taken = sorted(
            (places[o.value].offset, places[o.value].nbytes) for o in done if o.overlaps(life)
        )
        offset = 0
        for start, nbytes in taken:
            if offset + life.nbytes <= start:
                break
            offset = max(offset, start + nbytes)
        places[life.value] = Place(ARENA, offset, life.nbytes)
        done.append(life)
    return places


def _state_places(graph: Graph) -> dict[Value, Place]:
    places: dict[Value, Place] = {}
    offset = 0
    for op in graph.ops:
        if op.name == "state":
            nbytes = op.out.type.placed_nbytes
            places[op.out] = Place(STATE, offset, nbytes)
            offset += nbytes
            continue
        for v, shared in zip(op.outs, lookup(op).inplace, strict=True):
            if shared is not None:
                places[v] = places[op.args[shared]]
    return places


def weight_places(graph: Graph, offset: int = 0) -> dict[Value, Place]:
    """Constants that a launch reads, in the order in which the first step meets them, and those
    that are results."""
    const = const_values(graph)
    places: dict[Value, Place] = {}
    for read in (*(op.args for op in launched(graph)), graph.outs):
        for v in read:
            if v in const and v not in places:
                places[v] = Place(WEIGHTS, offset, v.type.placed_nbytes)
                offset += v.type.placed_nbytes
    return places


def run(graph: Graph, context: Context) -> Outcome:
    if is_onnx(graph):
        return _run_onnx(graph, context)
    found = lifetimes(graph)
    places = {**weight_places(graph), **_state_places(graph), **assign(found)}
    for v in graph.outs:
        places[v] = Place(OUT, 0, bytes_per_token(v))
    planned = placed(graph, places)
    peak = arena_bytes(planned)
    total = sum(life.nbytes for life in found)
    log = [
        LogEntry("arena", "", True, f"{peak} bytes per token for {total} of {len(found)} values"),
        LogEntry("state", "", True, f"{space_bytes(planned, STATE)} bytes"),
        LogEntry("weights", "", True, f"{space_bytes(planned, WEIGHTS)} bytes"),
    ]
    return Outcome(planned, tuple(log))


def _run_onnx(graph: Graph, context: Context) -> Outcome:
    planned = placed(graph, weight_places(graph, context.weights_start))
    ends = frees(planned)
    ops = [
        Op(op.name, op.args, op.outs, {**op.attrs, "frees": ends[op]}, op.loc)
        if ends.get(op)
        else op
        for op in planned.ops
    ]
    count = sum(map(len, ends.values()))
    log = (
        LogEntry("lifetimes", "", True, f"{count} values end before the graph does"),
        LogEntry("weights", "", True, f"{space_bytes(planned, WEIGHTS)} bytes"),
    )
    return Outcome(planned.with_ops(ops), log)


def placed(graph: Graph, places: dict[Value, Place]) -> Graph:
    """The graph with new values that carry their places."""
    by = {v: Value(v.name, v.type, places.get(v)) for v in graph.values()}

    def moved(op: Op) -> Op:
        args, outs = (tuple(by[v] for v in vs) for vs in (op.args, op.outs))
        return Op(op.name, args, outs, op.attrs, op.loc)

    args, outs = (tuple(by[v] for v in vs) for vs in (graph.args, graph.outs))
    return Graph(graph.name, args, tuple(map(moved, graph.ops)), outs, graph.attrs)


def space_bytes(graph: Graph, space: str) -> int:
    """The extent of a space: where its last value ends."""
    places = [v.place for v in graph.values() if v.place and v.place.space == space]
    return max((p.offset + p.nbytes for p in places), default=0)


def arena_bytes(graph: Graph) -> int:
    """Bytes of the arena per token."""
    return space_bytes(graph, ARENA)


def ensures(graph: Graph, context: Context) -> None:
    """By brute force: live values do not overlap, all are aligned, all have a place."""
    if is_onnx(graph):
        return check_frees(graph)
    found = lifetimes(graph)
    for i, a in enumerate(found):
        if a.value.place is None or a.value.place.offset % ALIGNMENT:
            raise IRError(f"40_memory_plan: {a.value} has place {a.value.place}")
        for b in found[:i]:
            if a.overlaps(b) and _collide(a.value, b.value):
                raise IRError(f"40_memory_plan: {a.value} and {b.value} are alive in one place")
    inputs = set(graph.args)
    for op in launched(graph):
        for v in (*op.args, *op.outs):
            if v.place is None and v not in inputs:
                raise IRError(f"40_memory_plan: {v} of {op.loc} has no place")


def _collide(a: Value, b: Value) -> bool:
    if a.place is None or b.place is None:
        return False
    return (
        a.place.offset < b.place.offset + b.place.nbytes
        and b.place.offset < a.place.offset + a.place.nbytes
    )
