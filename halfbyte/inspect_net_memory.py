"""`inspect --memory` of an ONNX graph: its weights, and how many values live at once.

The shapes of such a graph are facts of a run, which gives each value its memory as it is made. What
is fixed when it is compiled is where each value ends: that is shown, in bytes where shapes allow.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from .inspect_format import short, size, wrapped
from .inspect_memory import encoding_of
from .inspect_source import Source
from .ir.graph import Graph, Value
from .ir.types import DTYPE_BYTES, Plain


@dataclass(frozen=True, slots=True)
class Crowd:
    """The launch with the most of something alive around it: its number, and where it is."""

    launch: int
    loc: str
    count: int


@dataclass(frozen=True, slots=True)
class NetMemory:
    """Of the main graph, not of bodies. `sized`: how many of the values have a shape known by now;
    `bytes`: the most bytes of these at once.
    """

    weights: int
    weights_by_type: dict[str, int]
    launches: int
    values: int
    sized: int
    most_values: Crowd
    bytes: Crowd


def net_memory(source: Source) -> NetMemory:
    """From the record of the last phase."""
    by_type: Counter[str] = Counter()
    for weight in source.facts.weights:
        by_type[encoding_of(weight.type)] += weight.bytes
    graph = source.last
    made = [v for op in graph.ops if "launch" in op.attrs for v in op.outs]
    values = [*graph.args, *made]
    return NetMemory(
        weights=sum(by_type.values()),
        weights_by_type=dict(by_type.most_common()),
        launches=sum("launch" in op.attrs for op in graph.ops),
        values=len(values),
        sized=sum(_bytes(v) > 0 for v in values),
        most_values=_crowd(graph, dict.fromkeys(values, 1)),
        bytes=_crowd(graph, {v: _bytes(v) for v in values}),
    )


def _bytes(v: Value) -> int:
    """0 where a run alone knows."""
    enc = v.type.enc
    extents = [d for d in v.type.shape if isinstance(d, int)]
    if len(extents) < len(v.type.shape) or not isinstance(enc, Plain):
        return 0
    return math.prod(extents) * DTYPE_BYTES[enc.dtype]


def _crowd(graph: Graph, weight: dict[Value, int]) -> Crowd:
    """Where the sum over the values alive is largest."""
    named = {v.name: v for v in weight}
    alive = sum(weight[v] for v in graph.args)
    best = Crowd(0, "", alive)
    launches = [op for op in graph.ops if "launch" in op.attrs]
    for i, op in enumerate(launches):
        alive += sum(weight[v] for v in op.outs)
        if alive > best.count:
            best = Crowd(i, op.loc or str(op.out), alive)
        alive -= sum(weight[named[name]] for name in op.strs("frees"))
    return best


def net_memory_text(m: NetMemory) -> list[str]:
    """Sums first, then how a run places what it computes."""
    kinds = ", ".join(f"{name} {size(n)}" for name, n in m.weights_by_type.items())
    most, held = m.most_values, m.bytes
    at = f"at launch {most.launch} of {m.launches}, {short(most.loc)}"
    rows = [
        ("weights", size(m.weights), kinds),
        ("values", str(m.values), f"at most {most.count} of them at once, {at}"),
    ]
    if m.sized == m.values:
        where = f"at launch {held.launch}, {short(held.loc)}; with what a kernel needs beside them"
        rows.append(("at once", size(held.count), where))
    else:
        text = (
            f"of the values have a shape known by now, the most of them at once {size(held.count)}"
        )
        rows.append(("sized", f"{m.sized} of {m.values}", text))
    lines = [line for name, n, text in rows for line in wrapped(text, f"{name:9}  {n:>14}  ")]
    placed = (
        "Shapes are facts of a run: a value gets memory when it is made, and gives it back behind "
        "the launch that reads it last. Memory of one run is used again by the next."
    )
    return [*lines, "", *wrapped(placed)]
