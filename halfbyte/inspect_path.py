"""The way of one module's weights through a graph, and what a phase changed on it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from .inspect_format import collapsed, modules_of, short
from .inspect_source import Source
from .ir.errors import ModelError
from .ir.graph import Graph, Op, Value, const_values
from .ir.text import op_text

PLANNED = ("kernels", "launch")
"""Attributes that late phases add to an op without changing what it computes."""

ENDS = ("linear", "fused_linear", "attention", "add", "take_rows")
"""Ops behind which a result is somebody else's business."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a phase changed on a path: op lines that went and came, and what was planned of it."""

    removed: tuple[str, ...]
    added: tuple[str, ...]
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.notes)


def sources_of(graph: Graph) -> dict[str, list[str]]:
    """Each module of an imported graph -> the checkpoint tensors that it reads, in order.

    Rotary embeddings are no modules: their table is computed, not read.
    """
    const = const_values(graph)
    behind: dict[Value, list[str]] = {}
    found: dict[str, list[str]] = {}
    for op in graph.ops:
        if op.name == "weight":
            names = [op.get("source", "")]
        else:
            names = [name for v in op.args if v in const for name in behind.get(v, [])]
        for v in op.outs:
            behind[v] = names
        if names and op.loc and op.name != "rope":
            known = found.setdefault(op.loc, [])
            known.extend(name for name in names if name not in known)
    return found


def weightless(graph: Graph) -> list[str]:
    """The places of ops that read no constant: a softmax, a residual sum."""
    tensors = sources_of(graph)
    places = dict.fromkeys(m for op in graph.ops for m in modules_of(op.loc))
    return [place for place in places if place not in tensors]


def _alike(names: Iterable[str], wanted: str) -> list[str]:
    """The names that end with a part so called; where there are none, those that contain it."""
    ends = [name for name in names if name.endswith((f".{wanted}", f"/{wanted}"))]
    return ends or [name for name in names if wanted in name]


def resolve(source: Source, wanted: str) -> str:
    """The module of a name: itself, one of its tensors, its only end or its only part.

    Ops that read no constant are looked at behind those that do. Raises ModelError with what
    matches, or with what is close.
    """
    tensors, others = sources_of(source.first), weightless(source.first)
    if wanted in tensors or wanted in others:
        return wanted
    owners = [m for m, names in tensors.items() if wanted in names]
    owners = [m for m in owners if wanted.startswith(m)] or owners
    found = owners or _alike(tensors, wanted) or _alike(others, wanted)
    if len(found) == 1:
        return found[0]
    where = source.artifact.folder
    if found:
        error = ModelError(
            f"{where}: --layer {wanted}: {len(found)} modules match, expected one; "
            "name one of them in full:"
        )
        listed = collapsed(found)
    else:
        error = ModelError(
            f"{where}: --layer {wanted}: no such module or checkpoint tensor; "
            "expected one of these, or an end of it that no other has:"
        )
        listed = difflib.get_close_matches(wanted, [*tensors, *others], 5, 0.6)
        listed = listed or collapsed(tensors or others)
    error.add_note("\n".join(f"  {name}" for name in listed[:40]))
    raise error


def path_of(graph: Graph, tensors: Iterable[str], module: str) -> tuple[Op, ...]:
    """The ops from checkpoint tensors to what a step reads them with, in order.

    Where there are no tensors, the ops of the module. Of several readers (a tied embedding) that
    of `module`; all of them where it has none of its own any more (a norm that a linear took in).
    """
    names, const = set(tensors), const_values(graph)
    if not names:
        return tuple(op for op in graph.ops if module in modules_of(op.loc))
    reached: set[Value] = set()
    touched: list[Op] = []
    for op in graph.ops:
        if op.name == "weight" and op.get("source", "") in names:
            reached.update(op.outs)
            touched.append(op)
        elif any(v in reached for v in op.args):
            touched.append(op)
            reached.update(op.outs if op.out in const else ())
    readers = [op for op in touched if op.out not in const]
    own = [op for op in readers if module in modules_of(op.loc)] or readers
    needed = {v for op in own for v in op.args}
    kept: list[Op] = []
    for op in reversed(touched):
        if op in own or (op.out in const and any(v in needed for v in op.outs)):
            kept.append(op)
            needed.update(op.args if op.out in const else ())
    return tuple(reversed(kept))


def reader_of(path: tuple[Op, ...]) -> Op | None:
    """The op of a step at the end of a path."""
    return path[-1] if path and path[-1].name != "weight" else None


def behind(graph: Graph, path: tuple[Op, ...]) -> set[str]:
    """Locations of the ops that the path's result runs into, up to the next of ENDS."""
    uses = graph.uses()
    reader = reader_of(path)
    front = list(reader.outs) if reader else []
    found: set[Op] = set()
    while front:
        for op in uses.get(front.pop(), []):
            if op not in found:
                found.add(op)
                front.extend(op.outs if op.name not in ENDS else ())
    return {op.loc for op in found}


def line_of(op: Op) -> str:
    """The op without what later phases plan: its place, its kernels, its launch, its location."""
    attrs = {k: v for k, v in op.attrs.items() if k not in PLANNED}
    outs = tuple(Value(v.name, v.type) for v in op.outs)
    return op_text(dataclasses.replace(op, outs=outs, attrs=attrs, loc=""))


def delta(before: tuple[Op, ...], after: tuple[Op, ...]) -> Delta:
    """What changed between two paths; tensors as they are in the checkpoint are left out."""
    old = [line_of(op) for op in before if op.name != "weight"]
    new = [line_of(op) for op in after if op.name != "weight"]
    removed: list[str] = []
    added: list[str] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if kind != "equal":
            removed.extend(old[a:b])
            added.extend(new[c:d])
    return Delta(tuple(removed), tuple(added), tuple(_plans(before, after)))


def made_at(before: tuple[Op, ...], path: tuple[Op, ...]) -> set[str]:
    """Locations of the path's new ops: a tied weight is laid out where its other reader is."""
    known = {line_of(op) for op in before}
    return {op.loc for op in path if op.loc and op.name != "weight" and line_of(op) not in known}


def strangers(graph: Graph, before: tuple[Op, ...], path: tuple[Op, ...]) -> list[str]:
    """Who the operands of the path's new ops are that do not come from the module itself."""
    known = {line_of(op) for op in before}
    own = {v for op in path for v in op.outs}
    producers = graph.producers()
    found: dict[Value, str] = {}
    for op in path:
        if line_of(op) in known:
            continue
        for v in op.args:
            if v not in own and v not in found:
                found[v] = _origin(producers.get(v))
    return [f"{v} is {origin}" for v, origin in found.items()]


def _origin(producer: Op | None) -> str:
    if producer is None:
        return "an input of the step"
    name = producer.get("source", "")
    if name:
        return f"the {producer.name} {name}"
    return f"{short(producer.loc)}'s {producer.name}" if producer.loc else f"a {producer.name}"


def _plans(before: tuple[Op, ...], after: tuple[Op, ...]) -> list[str]:
    """Places and launch numbers that are new."""
    placed = {v.name for op in before for v in op.outs if v.place}
    launched = any("launch" in op.attrs for op in before)
    notes: list[str] = []
    for op in after:
        for v in op.outs:
            if v.place and v.name not in placed:
                notes.append(_place_note(v))
        if "launch" in op.attrs and not launched:
            notes.append(f"{op.name} is launch {op.attrs['launch']} of a step")
    return notes


def _place_note(v: Value) -> str:
    place = v.place
    assert place is not None
    span = f"{place.offset:#x}..{place.offset + place.nbytes:#x}"
    if place.space == "arena":
        return f"{v} lies in the arena at {span}, {place.nbytes} bytes per token"
    if place.space == "out":
        return f"{v} is written into the caller's buffer"
    return f"{v} lies in the {place.space} at {span}, {place.nbytes:,} bytes"
